//! Gives back the memory of code that has done its work.
//!
//! Most of this program's code runs once, before the guest does: the command line, loading a kernel, making tables. As
//! long as its pages are mapped they count as this process's memory. What is needed again comes back from the page
//! cache, a few pages at each fault.

unsafe extern "C" {
    /// Start and end of what the linker put into read-only and executable segments; both are defined by every linker
    /// for this target.
    static __executable_start: u8;
    static etext: u8;
}

const PAGE_BYTES: usize = 4096;

/// Unmaps the pages of this program's code and constants. They are clean copies of its file, so nothing is lost.
pub fn give_back() {
    let start = (&raw const __executable_start)
        .addr()
        .next_multiple_of(PAGE_BYTES);
    // Not the last page: it may hold the first of what comes behind.
    let end = (&raw const etext).addr() / PAGE_BYTES * PAGE_BYTES;
    let Some(length) = end.checked_sub(start) else {
        return;
    };
    // SAFETY: from the start of the image to the end of its code there are only private, read-only mappings of the
    // program's file, never written (relocated data is behind the code), so each page comes back as it was; the file
    // cannot change while it is executed. Failure leaves everything as it is.
    unsafe {
        libc::madvise(
            std::ptr::with_exposed_provenance_mut(start),
            length,
            libc::MADV_DONTNEED,
        )
    };
}
