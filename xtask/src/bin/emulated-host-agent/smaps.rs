//! How much memory a VMM takes besides the guest's.

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub outside_kib: u64,
    pub anonymous_kib: u64,
    pub guest_kib: u64,
}

struct Mapping {
    size_kib: u64,
    inode: u64,
    rss_kib: u64,
    anonymous_kib: u64,
}

/// Guest RAM is the largest mapping, with every other one of the same file (a memfd may be mapped in parts); without a
/// file, every mapping of at least half the guest's size. All else that is resident counts as the VMM's.
pub fn usage(smaps: &str, guest_mib: u64) -> Usage {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or("");
        let value = |word: Option<&str>| word.and_then(|w| w.parse::<u64>().ok()).unwrap_or(0);
        match first {
            "Rss:" => with_last(&mut mappings, |m| m.rss_kib = value(words.next())),
            "Anonymous:" => with_last(&mut mappings, |m| m.anonymous_kib = value(words.next())),
            _ => {
                // start-end perms offset device inode [path]
                let Some((start, end)) = first.split_once('-') else {
                    continue;
                };
                let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
                else {
                    continue;
                };
                let inode = value(words.nth(3));
                mappings.push(Mapping {
                    size_kib: (end - start) / 1024,
                    inode,
                    rss_kib: 0,
                    anonymous_kib: 0,
                });
            }
        }
    }
    let ram_inode = mappings.iter().max_by_key(|m| m.size_kib).map_or(0, |m| m.inode);
    let half = guest_mib * 1024 / 2;
    let mut usage = Usage::default();
    for mapping in &mappings {
        let is_ram = if ram_inode != 0 {
            mapping.inode == ram_inode
        } else {
            mapping.size_kib >= half
        };
        if is_ram {
            usage.guest_kib += mapping.rss_kib;
        } else {
            usage.outside_kib += mapping.rss_kib;
            usage.anonymous_kib += mapping.anonymous_kib;
        }
    }
    usage
}

fn with_last(mappings: &mut [Mapping], change: impl FnOnce(&mut Mapping)) {
    if let Some(last) = mappings.last_mut() {
        change(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_from_the_rest() {
        let memfd = "\
00400000-00500000 r-xp 00000000 00:01 7 /bin/actor-vmm
Rss:                 600 kB
Anonymous:             0 kB
7f0000000000-7f0008000000 rw-s 00000000 00:01 99 /memfd:ram (deleted)
Rss:               50000 kB
Anonymous:         50000 kB
7f0008000000-7f0010000000 rw-s 08000000 00:01 99 /memfd:ram (deleted)
Rss:                1000 kB
Anonymous:          1000 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
Rss:                  12 kB
Anonymous:            12 kB
";
        assert_eq!(
            usage(memfd, 256),
            Usage {
                outside_kib: 612,
                anonymous_kib: 12,
                guest_kib: 51000
            }
        );
        let anonymous = memfd.replace(" 99 /memfd:ram (deleted)", " 0");
        assert_eq!(
            usage(&anonymous, 256),
            Usage {
                outside_kib: 612,
                anonymous_kib: 12,
                guest_kib: 51000
            }
        );
    }
}
