//! A qcow2 image's header and tables, checked before the image is used. Pure: who calls reads the file.
//!
//! The format's own text is [qcow2]: `docs/interop/qcow2.rst` of QEMU. What is refused here is what would be lost or made
//! worse by going on: tables outside of the file (which read as zeroes, so as a disk without content), counts of
//! references that call a table's place free (which would be given away and written over), and all that nobody here can
//! read. The library that serves the image checks much of its own; it gets to see only what has passed here.

/// How a qcow2 image begins.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The most that a header, its extensions and the backing file's name can take: one cluster, of 2 MiB at most.
pub const MOST_HEADER_BYTES: u64 = 2 << 20;
/// The largest L1 table, bytes. QEMU's own limit.
const MOST_L1_BYTES: u64 = 32 << 20;
/// The largest refcount table, bytes. QEMU's own limit.
const MOST_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The largest name of a backing file, bytes. [qcow2: backing_file_size]
const MOST_NAME_BYTES: usize = 1023;
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// Of an entry of the L1 table or the refcount table. [qcow2: bits 9-55, and 9-63]
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Why an image cannot be used. Each says what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Flaw {
    /// Another format.
    #[error("it is not a qcow2 image, as format=qcow2 says; without that it is used as a raw one")]
    Magic,
    /// A version that is not 2 or 3.
    #[error("it is of version {0} of qcow2, and 2 and 3 can be used; `qemu-img convert -O qcow2` makes one")]
    Version(u32),
    /// The header does not make sense.
    #[error("its header is damaged ({0}); it can only be restored from a copy")]
    Header(&'static str),
    /// A table is not within the file.
    #[error(
        "its {0} is not within the file, which has been cut short or damaged; `qemu-img check` tells what is left"
    )]
    Outside(&'static str),
    /// Counts of references contradict the tables.
    #[error("its {0} is at a place that its reference counts call free; `qemu-img check -r all` mends that")]
    Unreferenced(&'static str),
    /// Not closed.
    #[error("it was not closed by who has used it last; `qemu-img check -r all` mends that")]
    Dirty,
    /// Marked as corrupt.
    #[error("it is marked as corrupt; `qemu-img check -r all` mends what can be")]
    Corrupt,
    /// Encrypted.
    #[error(
        "it is encrypted, which is not supported; `qemu-img convert -O qcow2` makes an image that is not"
    )]
    Encrypted,
    /// Its data are in another file.
    #[error(
        "its data are in another file, which is not supported; `qemu-img convert -O qcow2` puts them into one"
    )]
    ExternalData,
    /// Features that are not supported, by bits.
    #[error(
        "it has features that are not supported ({0}); `qemu-img convert -O qcow2` makes an image without"
    )]
    Features(String),
    /// Not whole sectors.
    #[error("its {0} bytes are not whole sectors of 512; `qemu-img resize` makes them")]
    Size(u64),
    /// Nothing in it.
    #[error("it has a size of 0; `qemu-img resize` gives it another")]
    Empty,
    /// A backing file whose format is not told.
    #[error(
        "it does not say which format its backing file {0} has; `qemu-img rebase -u -b {0} -F raw` (or qcow2) says it"
    )]
    BackingFormat(String),
    /// A backing file in another format.
    #[error("its backing file is of format '{0}', and raw and qcow2 can be used")]
    BackingKind(String),
    /// A backing file that is none.
    #[error(
        "its backing file '{0}' is not a path to a file; `qemu-img rebase -u -b PATH -F raw` (or qcow2) gives it one"
    )]
    BackingName(String),
}

/// Which format a backing file has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackingFormat {
    /// Its bytes are the disk's.
    Raw,
    /// Another qcow2 image.
    Qcow2,
}

/// What is behind an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backing {
    /// As the image has it: relative names are relative to the image's directory.
    pub name: String,
    /// As the image says.
    pub format: BackingFormat,
}

/// What the header says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// log2 of the bytes of a cluster.
    pub cluster_bits: u32,
    /// The disk's bytes.
    pub size: u64,
    /// What is behind.
    pub backing: Option<Backing>,
    l1_offset: u64,
    l1_entries: u32,
    refcount_table_offset: u64,
    refcount_table_clusters: u32,
    /// log2 of the bits of a reference count.
    refcount_order: u32,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// Reads a header. `bytes`: the file's first [`MOST_HEADER_BYTES`], or all of it if it is shorter.
///
/// # Errors
/// [`Flaw`]: the first that is found.
pub fn parse(bytes: &[u8]) -> Result<Header, Flaw> {
    if bytes.len() < MAGIC.len() || bytes[..MAGIC.len()] != MAGIC {
        return Err(Flaw::Magic);
    }
    if bytes.len() < V2_BYTES {
        return Err(Flaw::Outside("header"));
    }
    let version = be32(bytes, 4);
    let (incompatible, refcount_order, header_bytes) = match version {
        2 => (0, 4, V2_BYTES),
        3 if bytes.len() < V3_BYTES => return Err(Flaw::Outside("header")),
        3 => (be64(bytes, 72), be32(bytes, 96), be32(bytes, 100) as usize),
        other => return Err(Flaw::Version(other)),
    };
    features(incompatible)?;
    if be32(bytes, 32) != 0 {
        return Err(Flaw::Encrypted);
    }
    let cluster_bits = be32(bytes, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(Flaw::Header("its clusters have no size that is possible"));
    }
    let cluster = &bytes[..bytes.len().min(1 << cluster_bits)];
    if refcount_order > 6 {
        return Err(Flaw::Header("its reference counts have no size that is possible"));
    }
    if version == 3 && (header_bytes < V3_BYTES || header_bytes > cluster.len()) {
        return Err(Flaw::Header("its length is not possible"));
    }
    let size = be64(bytes, 24);
    if size == 0 {
        return Err(Flaw::Empty);
    }
    if !size.is_multiple_of(super::super::SECTOR_BYTES) {
        return Err(Flaw::Size(size));
    }
    let header = Header {
        cluster_bits,
        size,
        backing: backing(cluster, header_bytes)?,
        l1_offset: be64(bytes, 40),
        l1_entries: be32(bytes, 36),
        refcount_table_offset: be64(bytes, 48),
        refcount_table_clusters: be32(bytes, 56),
        refcount_order,
    };
    // An L2 table has 8 bytes for each cluster.
    let l2_reaches = 1u64 << (2 * cluster_bits - 3);
    if u64::from(header.l1_entries) < size.div_ceil(l2_reaches) {
        return Err(Flaw::Header("its L1 table is too small for its size"));
    }
    if u64::from(header.l1_entries) * 8 > MOST_L1_BYTES {
        return Err(Flaw::Header("its L1 table is larger than any may be"));
    }
    let table_bytes = u64::from(header.refcount_table_clusters) << cluster_bits;
    if header.refcount_table_clusters == 0 || table_bytes > MOST_REFCOUNT_TABLE_BYTES.max(1 << cluster_bits) {
        return Err(Flaw::Header("its refcount table has no size that is possible"));
    }
    Ok(header)
}

/// Which of the incompatible features are in the way. [qcow2: incompatible_features]
fn features(bits: u64) -> Result<(), Flaw> {
    const NAMES: [(u32, &str); 2] = [(3, "compression that is not zlib's"), (4, "extended L2 entries")];
    if bits & 1 << 1 != 0 {
        return Err(Flaw::Corrupt);
    }
    if bits & 1 << 0 != 0 {
        return Err(Flaw::Dirty);
    }
    if bits & 1 << 2 != 0 {
        return Err(Flaw::ExternalData);
    }
    let name = |bit: u32| match NAMES.iter().find(|(number, _)| *number == bit) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("bit {bit}"),
    };
    let set: Vec<String> = (0..64).filter(|bit| bits & 1 << bit != 0).map(name).collect();
    if set.is_empty() {
        Ok(())
    } else {
        Err(Flaw::Features(set.join(", ")))
    }
}

/// What is behind the image, out of its first cluster.
fn backing(cluster: &[u8], header_bytes: usize) -> Result<Option<Backing>, Flaw> {
    let damaged = Flaw::Header("the name of its backing file is not within its first cluster");
    let (offset, length) = (be64(cluster, 8), be32(cluster, 16) as usize);
    if offset == 0 {
        return Ok(None);
    }
    let begin = usize::try_from(offset).ok().filter(|_| length <= MOST_NAME_BYTES);
    let name = begin.and_then(|begin| cluster.get(begin..begin.checked_add(length)?));
    let name = String::from_utf8_lossy(name.ok_or(damaged)?).into_owned();
    let format = match backing_format(cluster, header_bytes)?.as_deref() {
        Some("raw" | "file" | "host_device") => BackingFormat::Raw,
        Some("qcow2") => BackingFormat::Qcow2,
        Some(other) => return Err(Flaw::BackingKind(other.into())),
        None => return Err(Flaw::BackingFormat(name)),
    };
    // As QEMU decides it: what has a colon before any slash names a protocol.
    let protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
    if name.is_empty() || name.contains(['\0', '\u{fffd}']) || protocol {
        return Err(Flaw::BackingName(name));
    }
    Ok(Some(Backing { name, format }))
}

/// The extension that names the backing file's format. [qcow2: header extensions]
fn backing_format(cluster: &[u8], mut at: usize) -> Result<Option<String>, Flaw> {
    const END: u32 = 0;
    const FORMAT: u32 = 0xe279_2aca;
    let damaged = Flaw::Header("its extensions are not within its first cluster");
    loop {
        let head = at.checked_add(8).and_then(|end| cluster.get(at..end));
        let head = head.ok_or_else(|| damaged.clone())?;
        let (kind, length) = (be32(head, 0), be32(head, 4) as usize);
        let begin = at + 8;
        let data = begin.checked_add(length).and_then(|end| cluster.get(begin..end));
        let data = data.ok_or_else(|| damaged.clone())?;
        match kind {
            END => return Ok(None),
            FORMAT => return Ok(Some(String::from_utf8_lossy(data).into_owned())),
            _ => at = begin + length.next_multiple_of(8),
        }
    }
}

/// Reads from the image's file, all or nothing.
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> std::io::Result<()> + 'a;

/// What is wrong with the tables, or the host's error.
#[derive(Debug)]
pub enum TableError {
    /// With the image.
    Flaw(Flaw),
    /// With the host.
    Host(std::io::Error),
}

impl From<Flaw> for TableError {
    fn from(flaw: Flaw) -> Self {
        TableError::Flaw(flaw)
    }
}

impl From<std::io::Error> for TableError {
    fn from(error: std::io::Error) -> Self {
        TableError::Host(error)
    }
}

impl Header {
    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether a table of so many bytes can be there.
    fn within(&self, what: &'static str, offset: u64, bytes: u64, file_bytes: u64) -> Result<(), Flaw> {
        let end = offset.checked_add(bytes);
        let good = offset.is_multiple_of(self.cluster_bytes()) && offset != 0;
        if good && end.is_some_and(|end| end <= file_bytes) {
            Ok(())
        } else {
            Err(Flaw::Outside(what))
        }
    }

    /// Checks that all tables are within the file of so many bytes, and, of an image that will be `written`, that no
    /// table is at a place that counts as free.
    ///
    /// # Errors
    /// [`TableError`].
    pub fn check_tables(
        &self,
        file_bytes: u64,
        written: bool,
        read: &mut ReadAt<'_>,
    ) -> Result<(), TableError> {
        let l1_bytes = u64::from(self.l1_entries) * 8;
        self.within("L1 table", self.l1_offset, l1_bytes, file_bytes)?;
        let table_bytes = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        self.within(
            "refcount table",
            self.refcount_table_offset,
            table_bytes,
            file_bytes,
        )?;
        let l2_tables = self.entries("L2 table", self.l1_offset, l1_bytes, file_bytes, read)?;
        let blocks = self.entries(
            "refcount block",
            self.refcount_table_offset,
            table_bytes,
            file_bytes,
            read,
        )?;
        if !written {
            return Ok(());
        }
        let mut counts = Counts {
            header: self,
            blocks: &blocks,
        };
        counts.held("header", 0, 1, read)?;
        counts.held("L1 table", self.l1_offset, l1_bytes, read)?;
        counts.held("refcount table", self.refcount_table_offset, table_bytes, read)?;
        for (_, table) in &l2_tables {
            counts.held("L2 table", *table, 1, read)?;
        }
        for (_, block) in &blocks {
            counts.held("refcount block", *block, 1, read)?;
        }
        Ok(())
    }

    /// The places that a table names, with their indices; all are within the file.
    fn entries(
        &self,
        what: &'static str,
        offset: u64,
        bytes: u64,
        file_bytes: u64,
        read: &mut ReadAt<'_>,
    ) -> Result<Vec<(u64, u64)>, TableError> {
        let mut found = Vec::new();
        let mut buffer = vec![0; bytes.min(64 << 10) as usize];
        let mut done = 0;
        while done < bytes {
            let part = &mut buffer[..(bytes - done).min(64 << 10) as usize];
            read(offset + done, part)?;
            for (number, entry) in part.chunks_exact(8).enumerate() {
                let place = be64(entry, 0) & OFFSET_MASK;
                if place != 0 {
                    self.within(what, place, self.cluster_bytes(), file_bytes)?;
                    found.push((done / 8 + number as u64, place));
                }
            }
            done += part.len() as u64;
        }
        Ok(found)
    }
}

/// Looks counts of references up.
struct Counts<'a> {
    header: &'a Header,
    /// Index and place of each refcount block, in order of the index.
    blocks: &'a [(u64, u64)],
}

impl Counts<'_> {
    /// Each cluster of a range counts as used.
    fn held(
        &mut self,
        what: &'static str,
        offset: u64,
        bytes: u64,
        read: &mut ReadAt<'_>,
    ) -> Result<(), TableError> {
        let bits = self.header.cluster_bits;
        for cluster in offset >> bits..=(offset + bytes - 1) >> bits {
            if self.count_is_zero(cluster, read)? {
                return Err(Flaw::Unreferenced(what).into());
            }
        }
        Ok(())
    }

    fn count_is_zero(&mut self, cluster: u64, read: &mut ReadAt<'_>) -> Result<bool, TableError> {
        // log2 of the counts of a block.
        let per_block = self.header.cluster_bits + 3 - self.header.refcount_order;
        let (index, within) = (cluster >> per_block, cluster & ((1 << per_block) - 1));
        let Ok(found) = self.blocks.binary_search_by_key(&index, |(index, _)| *index) else {
            return Ok(true);
        };
        let width = 1u64 << self.header.refcount_order;
        let first_bit = within * width;
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..width.div_ceil(8) as usize];
        read(self.blocks[found].1 + first_bit / 8, bytes)?;
        // [qcow2: counts of less than a byte fill it from its lowest bit on]
        if width < 8 {
            let mask = (1u8 << width) - 1;
            return Ok(bytes[0] >> (first_bit % 8) & mask == 0);
        }
        Ok(bytes.iter().all(|byte| *byte == 0))
    }
}
