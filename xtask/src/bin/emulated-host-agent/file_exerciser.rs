//! The same program as `file-exerciser`, inside a guest: does to a file system what its programs do, at random from a seed,
//! and compares all that it reads with a model in its own memory.
//!
//! `file-exerciser DIR SEED OPERATIONS`: a few files in a few directories below DIR. An operation is one of: write, read,
//! append, truncate, fsync, close and open again, a write or a read through a mapping, rename over another file, unlink and make
//! anew, a link and what is behind it, a directory with files that is listed and removed. Lengths are of all orders up to
//! [`MOST`], so that requests are of one page and of many. At the end every file is read as a whole, and its sum printed as
//! `sum: NAME BYTES SUM`, for whoever wants to compare it with what is on the host. The first thing that is wrong ends it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::ptr;

use anyhow::{Context, Result, bail, ensure};

/// The longest that a file becomes, bytes.
const MOST: usize = 3 << 20;
const FILES: usize = 4;

pub fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, seed, operations] = args.as_slice() else {
        bail!("file-exerciser DIR SEED OPERATIONS");
    };
    let seed = seed.parse().context("SEED is a number")?;
    let operations: u64 = operations.parse().context("OPERATIONS is a number")?;
    let mut exerciser = Exerciser::new(Path::new(dir), seed)?;
    for number in 0..operations {
        let what = exerciser
            .step()
            .with_context(|| format!("operation {number} of seed {seed}"))?;
        if number % 100 == 99 {
            println!("exercise: {} operations, the last: {what}", number + 1);
        }
    }
    exerciser.finish()
}

/// xorshift64*: the same numbers everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit.max(1)
    }

    /// Of all orders of magnitude.
    fn length(&mut self, limit: usize) -> usize {
        let order = self.below(21);
        self.below(2 << order).min(limit)
    }
}

struct Exercised {
    path: PathBuf,
    file: File,
    /// What has to be in it.
    model: Vec<u8>,
}

struct Exerciser {
    dir: PathBuf,
    random: Random,
    files: Vec<Exercised>,
    made: u64,
}

fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options
        .open(path)
        .with_context(|| format!("open {}", path.display()))
}

impl Exerciser {
    fn new(dir: &Path, seed: u64) -> Result<Exerciser> {
        let mut files = Vec::new();
        for number in 0..FILES {
            let place = dir.join(format!("d{}", number % 2));
            fs::create_dir_all(&place).context("mkdir")?;
            let path = place.join(format!("f{number}"));
            let file = open(&path)?;
            file.set_len(0)?;
            files.push(Exercised {
                path,
                file,
                model: Vec::new(),
            });
        }
        Ok(Exerciser {
            dir: dir.into(),
            random: Random(seed.wrapping_mul(2) + 1),
            files,
            made: 0,
        })
    }

    fn step(&mut self) -> Result<&'static str> {
        let number = self.random.below(FILES);
        let choice = self.random.below(100);
        let random = &mut self.random;
        let this = &mut self.files[number];
        Ok(match choice {
            0..25 => {
                let at = random.below(MOST);
                let bytes = random.length(MOST - at);
                let data = fill(random, bytes);
                this.file.write_all_at(&data, at as u64).context("write")?;
                this.place(at, &data);
                "write"
            }
            25..50 => {
                let at = random.below(this.model.len() + 1);
                let bytes = random.length(MOST);
                this.compare(at, bytes)?;
                "read"
            }
            50..55 => {
                let room = MOST - this.model.len();
                let bytes = random.length(room);
                let data = fill(random, bytes);
                let mut end = OpenOptions::new().append(true).open(&this.path).context("open")?;
                end.write_all(&data).context("append")?;
                this.model.extend(&data);
                "append"
            }
            55..63 => {
                let bytes = random.below(MOST);
                this.file.set_len(bytes as u64).context("truncate")?;
                this.model.resize(bytes, 0);
                "truncate"
            }
            63..68 => {
                this.file.sync_all().context("fsync")?;
                "fsync"
            }
            68..74 => {
                this.file = open(&this.path)?;
                let length = this.file.metadata().context("stat")?.len();
                ensure!(
                    length == this.model.len() as u64,
                    "it has {length} bytes, not {}",
                    this.model.len()
                );
                "open"
            }
            74..80 if !this.model.is_empty() => {
                let at = random.below(this.model.len());
                let bytes = random.length(this.model.len() - at);
                let data = fill(random, bytes);
                let mapping = Mapping::new(&this.file, this.model.len())?;
                mapping.store(at, &data)?;
                drop(mapping);
                this.place(at, &data);
                "write through a mapping"
            }
            80..86 if !this.model.is_empty() => {
                let at = random.below(this.model.len());
                let bytes = random.length(this.model.len() - at);
                let mapping = Mapping::new(&this.file, this.model.len())?;
                ensure!(
                    mapping.load(at, bytes) == this.model[at..at + bytes],
                    "a mapping of {bytes} bytes at {at} shows something else"
                );
                "read through a mapping"
            }
            86..90 => {
                let other = self.dir.join("new");
                let bytes = self.random.length(MOST);
                let data = fill(&mut self.random, bytes);
                fs::write(&other, &data).context("write")?;
                let this = &mut self.files[number];
                fs::rename(&other, &this.path).context("rename")?;
                ensure!(!other.exists(), "the old name is there");
                this.file = open(&this.path)?;
                this.model = data;
                "rename"
            }
            90..93 => {
                fs::remove_file(&this.path).context("unlink")?;
                // It is there as long as it is open.
                this.compare(0, this.model.len())?;
                this.file = open(&this.path)?;
                this.model.clear();
                "unlink"
            }
            93..96 => self.links(number)?,
            _ => self.directory()?,
        })
    }

    fn links(&mut self, number: usize) -> Result<&'static str> {
        let this = &self.files[number];
        let (soft, hard) = (self.dir.join("soft"), self.dir.join("hard"));
        symlink(&this.path, &soft).context("symlink")?;
        ensure!(
            fs::read_link(&soft).context("readlink")? == this.path,
            "the link leads elsewhere"
        );
        fs::hard_link(&this.path, &hard).context("link")?;
        let (one, two) = (fs::metadata(&this.path)?, fs::metadata(&hard)?);
        ensure!(
            (one.ino(), two.nlink()) == (two.ino(), 2),
            "the link is another file"
        );
        ensure!(
            fs::read(&hard).context("read")? == this.model,
            "the link has other content"
        );
        fs::remove_file(&soft).context("unlink")?;
        fs::remove_file(&hard).context("unlink")?;
        Ok("links")
    }

    fn directory(&mut self) -> Result<&'static str> {
        self.made += 1;
        let place = self.dir.join(format!("t{}", self.made));
        fs::create_dir(&place).context("mkdir")?;
        let files = self.random.below(40);
        let mut expected: Vec<_> = (0..files).map(|number| format!("entry-{number}")).collect();
        for name in &expected {
            fs::write(place.join(name), name).context("write")?;
        }
        ensure!(
            files == 0 || fs::remove_dir(&place).is_err(),
            "a directory with files was removed"
        );
        let mut found = Vec::new();
        for entry in fs::read_dir(&place).context("readdir")? {
            let name = entry
                .context("readdir")?
                .file_name()
                .to_string_lossy()
                .into_owned();
            ensure!(
                fs::read_to_string(place.join(&name)).context("read")? == name,
                "{name} has other content"
            );
            found.push(name);
        }
        expected.sort();
        found.sort();
        ensure!(found == expected, "the directory lists {found:?}");
        fs::remove_dir_all(&place).context("rmdir")?;
        ensure!(!place.exists(), "the directory is still there");
        Ok("directory")
    }

    fn finish(self) -> Result<()> {
        for this in &self.files {
            this.file.sync_all().context("fsync")?;
            let content = fs::read(&this.path).context("read")?;
            ensure!(content == this.model, "{} has other content", this.path.display());
            let name = this.path.strip_prefix(&self.dir)?.display();
            println!("sum: {name} {} {:016x}", content.len(), sum(&content));
        }
        Ok(())
    }
}

impl Exercised {
    fn place(&mut self, at: usize, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let end = at + data.len();
        self.model.resize(self.model.len().max(end), 0);
        self.model[at..end].copy_from_slice(data);
    }

    /// Reads a piece that may go beyond the end.
    fn compare(&self, at: usize, bytes: usize) -> Result<()> {
        let mut found = vec![0; bytes];
        let mut done = 0;
        while done < bytes {
            match self
                .file
                .read_at(&mut found[done..], (at + done) as u64)
                .context("read")?
            {
                0 => break,
                read => done += read,
            }
        }
        let expected = &self.model[at..self.model.len().min(at + bytes)];
        ensure!(
            done == expected.len(),
            "{done} bytes at {at}, not {}",
            expected.len()
        );
        let wrong = found.iter().zip(expected).position(|(one, two)| one != two);
        ensure!(
            wrong.is_none(),
            "{bytes} bytes at {at}: the first that is wrong is number {wrong:?}"
        );
        Ok(())
    }
}

fn fill(random: &mut Random, bytes: usize) -> Vec<u8> {
    let mut data = Vec::with_capacity(bytes + 8);
    while data.len() < bytes {
        data.extend(random.next().to_le_bytes());
    }
    data.truncate(bytes);
    data
}

/// FNV-1a, 64 bits.
fn sum(bytes: &[u8]) -> u64 {
    let step = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// A file, mapped as shared memory.
struct Mapping {
    start: *mut libc::c_void,
    bytes: usize,
}

impl Mapping {
    fn new(file: &File, bytes: usize) -> Result<Mapping> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        ensure!(
            start != libc::MAP_FAILED,
            "mmap: {}",
            std::io::Error::last_os_error()
        );
        Ok(Mapping { start, bytes })
    }

    fn store(&self, at: usize, data: &[u8]) -> Result<()> {
        assert!(at + data.len() <= self.bytes);
        // SAFETY: within the mapping, to which nobody has a reference; the file is as long, and we alone change that.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), self.start.cast::<u8>().add(at), data.len()) };
        // SAFETY: the mapping as a whole.
        let done = unsafe { libc::msync(self.start, self.bytes, libc::MS_SYNC) };
        ensure!(done == 0, "msync: {}", std::io::Error::last_os_error());
        Ok(())
    }

    fn load(&self, at: usize, bytes: usize) -> Vec<u8> {
        assert!(at + bytes <= self.bytes);
        let mut data = vec![0; bytes];
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(self.start.cast::<u8>().add(at), data.as_mut_ptr(), bytes) };
        data
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, which nobody uses any more.
        unsafe { libc::munmap(self.start, self.bytes) };
    }
}
