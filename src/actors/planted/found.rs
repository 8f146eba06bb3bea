//! Every planted bug, and the model that finds it.

use super::Bug::{self, *};
use super::Half::{self, Acquire, Release, Total};
use super::Mutant::{self, Has, Loses};
use super::{Site, plant};
use crate::actors::models::*;
use crate::host::timer::models::*;
use crate::host::wish::models::*;
use crate::vcpu::kick::models::*;

type Model = fn();

/// Halves of orderings.
const ORDERINGS: &[(Site, Half, Model)] = &[
    (Site::Take, Acquire, loom_two_asks_are_two_turns),
    (Site::LetGo, Release, loom_two_asks_are_two_turns),
    (Site::Sweep, Acquire, loom_two_asks_are_two_turns),
    (Site::Register, Acquire, loom_two_asks_are_two_turns),
    (Site::Register, Release, loom_two_asks_are_two_turns),
    (Site::Close, Acquire, loom_a_message_ends_the_actor),
    (Site::Close, Release, loom_a_friend_meets_the_end),
    (
        Site::Fence,
        Acquire,
        loom_a_fence_comes_after_the_turn_and_not_after_the_taking,
    ),
    (Site::FallAsleep, Release, loom_resident_sleeps_and_is_woken),
    (Site::Ring, Acquire, loom_resident_with_two_senders),
    (Site::Connect, Acquire, loom_a_lane_is_used_again),
    (Site::Disconnect, Release, loom_a_lane_is_used_again),
    (Site::Push, Release, loom_posts_in_lanes_that_share_a_bit),
    (Site::Pop, Acquire, loom_posts_in_lanes_that_share_a_bit),
    (Site::Free, Release, loom_posts_keep_their_order_and_none_is_lost),
    (
        Site::Refill,
        Acquire,
        loom_posts_keep_their_order_and_none_is_lost,
    ),
    (Site::Call, Release, loom_lanes_that_share_a_bit),
    (Site::HasCall, Acquire, loom_lanes_that_share_a_bit),
    (Site::Conclude, Release, loom_two_asks_are_two_turns),
    (Site::Grant, Release, loom_three_asks_with_hand_over),
    (Site::Kill, Release, loom_a_message_ends_the_actor),
    (Site::Settled, Acquire, loom_two_asks_are_two_turns),
    (
        Site::Keep,
        Release,
        loom_a_keeper_that_is_away_keeps_nobody_waiting,
    ),
    (Site::Unkeep, Acquire, loom_who_revokes_knows_who_keeps),
    (Site::KeeperEnters, Total, loom_a_keeper_and_who_comes),
    (Site::KeeperLeaves, Release, loom_a_keeper_and_who_comes),
    (Site::KeeperLooks, Total, loom_a_keeper_and_who_comes),
    (Site::Revoke, Total, loom_a_keeper_and_who_comes),
    (Site::RevokerLooks, Acquire, loom_a_keeper_and_who_comes),
    (Site::Mark, Acquire, loom_a_kick_is_never_lost),
    (Site::Mark, Release, loom_a_kick_is_never_lost),
    (Site::Enter, Release, loom_a_kick_is_never_lost),
    (Site::Leave, Acquire, loom_a_kick_is_never_lost),
    (Site::CountDown, Release, loom_a_kick_is_never_lost),
    (Site::Gone, Acquire, loom_a_kick_is_never_lost),
    (
        Site::Wish,
        Total,
        loom_nothing_is_left_lying_and_nobody_sleeps_for_ever,
    ),
    (
        Site::Change,
        Total,
        loom_nothing_is_left_lying_and_nobody_sleeps_for_ever,
    ),
];

/// Everything else.
const BUGS: &[(Bug, Model)] = &[
    (LetGoBlindly, loom_two_asks_are_two_turns),
    (HandOverForgets, loom_what_a_holder_hands_over_is_served),
    (HandToSleeper, loom_three_asks_with_hand_over),
    (CloseForgets, loom_a_message_ends_the_actor),
    (CloseLetsSleep, loom_a_message_ends_the_actor),
    (RegisterAndGo, loom_two_asks_are_two_turns),
    (ExpectForEver, loom_a_friend_that_has_gone_is_not_waited_for),
    (ParkBlindly, loom_two_asks_are_two_turns),
    (WakeFirst, loom_two_asks_are_two_turns),
    (CallFirst, loom_posts_keep_their_order_and_none_is_lost),
    (
        FenceByLane,
        loom_a_fence_comes_after_the_turn_and_not_after_the_taking,
    ),
    (SleepBlindly, loom_resident_sleeps_and_is_woken),
    (BellLate, loom_resident_sleeps_and_is_woken),
    (RevokeBlindly, loom_a_keeper_and_who_comes),
    (ClaimBlindly, loom_a_keeper_and_who_comes),
    (ClaimAnother, loom_who_was_held_up_claims_no_later_keeping),
    (KeepBlindly, loom_a_keeper_and_who_comes),
    (RevokeTogether, loom_a_kept_token_is_revoked_once),
    (KeepWhatever, loom_a_kept_token_is_revoked_once),
    (SignalFirst, loom_a_kick_is_never_lost),
    (NotCounted, loom_a_kick_is_never_lost),
    (
        MarkedAlready,
        loom_two_kickers_are_both_heard_and_a_burst_costs_one_signal,
    ),
    (
        SignalAlways,
        loom_two_kickers_are_both_heard_and_a_burst_costs_one_signal,
    ),
    (EnterBlindly, loom_a_kick_is_never_lost),
    (GoneUnsaid, loom_a_thread_that_ends_inside_gets_no_signal),
    (WishBlindly, loom_nothing_is_left_lying_and_nobody_sleeps_for_ever),
    (WakeBeforeDeadline, loom_no_deadline_is_slept_through),
    (TakeBlindly, loom_no_deadline_is_slept_through),
];

/// All of them.
fn mutants() -> Vec<(Mutant, Model)> {
    let orderings = ORDERINGS
        .iter()
        .map(|(site, half, model)| (Loses(*site, *half), *model));
    let bugs = BUGS.iter().map(|(bug, model)| (Has(*bug), *model));
    orderings.chain(bugs).collect()
}

/// Tells the test below which mutant it has.
const NUMBER: &str = "PLANTED";

/// A failing model may take its process with it: loom cannot go on when it unwinds.
#[test]
#[ignore = "run by loom_every_planted_bug_is_found, once a mutant"]
fn with_a_planted_bug() {
    let number: usize = std::env::var(NUMBER).unwrap().parse().unwrap();
    let (mutant, model) = mutants()[number];
    plant(mutant);
    model();
}

#[test]
fn loom_every_planted_bug_is_found() {
    let mut missed = Vec::new();
    for (number, (mutant, _)) in mutants().into_iter().enumerate() {
        let begin = std::time::Instant::now();
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture"])
            .arg(format!(
                "{}::with_a_planted_bug",
                &module_path!()["actor_vmm::".len()..]
            ))
            .env(NUMBER, number.to_string())
            .env("RUST_BACKTRACE", "0")
            .output()
            .unwrap();
        let (stdout, stderr) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        // A list that names what is not there, or a test that does not run, would find anything.
        assert!(
            stdout.contains("running 1 test") && !stderr.contains("mend the list"),
            "{mutant:?}: {stdout}\n{stderr}"
        );
        let said = stderr
            .lines()
            .skip_while(|line| !line.contains("panicked at"))
            .nth(1);
        match said {
            Some(said) if !output.status.success() => {
                println!("{mutant:?}: {said} ({} ms)", begin.elapsed().as_millis());
            }
            _ => missed.push(format!("{mutant:?}")),
        }
    }
    assert!(missed.is_empty(), "no model finds {}", missed.join(", "));
}
