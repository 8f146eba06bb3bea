//! Whether this host's KVM can be used, for all tests that need it: without it they do nothing and say so, and under CI they
//! fail.

use std::fs::File;
use std::io::Write;

/// Says on stderr, past the capture of the test harness, that something is not tested.
pub fn skipped(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "CI may not skip this: {why}");
    let _ = writeln!(std::io::stderr(), "**** SKIPPED: {why} ****");
}

/// Whether /dev/kvm can be used. CI must have it.
pub fn have_kvm() -> bool {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            assert!(
                std::env::var_os("CI").is_none(),
                "CI must have a usable /dev/kvm: {error}"
            );
            skipped(&format!("/dev/kvm cannot be used ({error})"));
            false
        }
    }
}
