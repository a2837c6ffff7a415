//! What a shadow gives back before it has nothing more to do than to wait: memory that it needed to get there.

use std::ffi::{c_char, c_void};

use rustix::mm::{Advice, madvise};

// Of the linker: where the program's constants and code begin, and where they end.
unsafe extern "C" {
    static __executable_start: c_char;
    static etext: c_char;
}

/// How much deeper than it is now a thread's stack may have been.
const STACK: usize = 256 << 10;

/// Gives back what the allocator keeps and the deep end of this thread's stack, and lets go of the pages of the program's own file: few
/// are used from here on, and the kernel maps those again when they are. On an idle node with many pods this is most of what a shadow
/// weighs.
pub fn give_back() {
    // SAFETY: it changes nothing that is allocated.
    unsafe { libc::malloc_trim(0) };
    // SAFETY: it only asks; the C library has known since the program began.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(1) as usize;
    let here = std::hint::black_box(page);
    // Two pages are for the calls made from here.
    let stack = &raw const here as usize / page * page - 2 * page;
    let text = (&raw const __executable_start as usize).next_multiple_of(page)..&raw const etext as usize / page * page;
    for range in [text, stack - STACK..stack] {
        // SAFETY: private pages of a file that are never written, so that what is read there next is what was there before; and what lies
        // beyond the end of this thread's stack. If it does not work nothing is lost.
        let _ = unsafe { madvise(range.start as *mut c_void, range.len(), Advice::LinuxDontNeed) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_goes_on_without_its_pages() {
        let before: Vec<String> = (0..100).map(|number| format!("{number}")).collect();
        give_back();
        assert_eq!(before, (0..100).map(|number: i32| number.to_string()).collect::<Vec<_>>());
    }
}
