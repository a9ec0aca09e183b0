//! Open files and the texts they have read. As in the kernel's seq_file, a read from the start makes the text and later
//! reads continue in that same text. Handles are numbers, not pointers: a handle of a daemon that is dead has no text here
//! and gets one made anew.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Texts kept at once, in bytes. Beyond it the oldest goes, and its file's next read makes a new one.
const MOST_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub struct Handles {
    /// Upper half of all handles of this daemon, so that those of an earlier one are not taken for ours.
    epoch: u32,
    next: AtomicU32,
    texts: Mutex<Texts>,
}

#[derive(Debug, Default)]
struct Texts {
    by_handle: HashMap<u64, Text>,
    bytes: usize,
    /// Counts texts; the lowest is the oldest.
    clock: u64,
}

#[derive(Debug)]
struct Text {
    inode: u64,
    made: u64,
    bytes: Box<[u8]>,
}

impl Handles {
    /// `epoch` tells this daemon from those before it on the same connection.
    pub fn new(epoch: u32) -> Self {
        Self { epoch, next: AtomicU32::new(1), texts: Mutex::default() }
    }

    pub fn open(&self) -> u64 {
        u64::from(self.epoch) << 32 | u64::from(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// What a read at `offset` of `size` bytes gets; `None` if the text has to be made.
    pub fn read(&self, handle: u64, inode: u64, offset: u64, size: u32) -> Option<Vec<u8>> {
        if offset == 0 {
            return None;
        }
        let texts = self.lock();
        let text = texts.by_handle.get(&handle).filter(|text| text.inode == inode)?;
        Some(part(&text.bytes, offset, size).to_vec())
    }

    /// Keeps a text that was made, as far as the handle is ours.
    pub fn keep(&self, handle: u64, inode: u64, text: &[u8]) {
        if handle >> 32 != u64::from(self.epoch) || text.len() > MOST_BYTES {
            return;
        }
        let mut texts = self.lock();
        texts.forget(handle);
        while texts.bytes + text.len() > MOST_BYTES {
            let Some(oldest) =
                texts.by_handle.iter().min_by_key(|(_, text)| text.made).map(|(handle, _)| *handle)
            else {
                break;
            };
            texts.forget(oldest);
        }
        texts.clock += 1;
        texts.bytes += text.len();
        let made = texts.clock;
        texts.by_handle.insert(handle, Text { inode, made, bytes: text.into() });
    }

    pub fn release(&self, handle: u64) {
        self.lock().forget(handle);
    }

    fn lock(&self) -> MutexGuard<'_, Texts> {
        // No panic can happen while the lock is held.
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Texts {
    fn forget(&mut self, handle: u64) {
        if let Some(text) = self.by_handle.remove(&handle) {
            self.bytes -= text.bytes.len();
        }
        if self.by_handle.is_empty() {
            self.by_handle.shrink_to(64);
        }
    }
}

/// The part of a text that a read at `offset` of `size` bytes gets.
pub fn part(text: &[u8], offset: u64, size: u32) -> &[u8] {
    let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
    let length = usize::try_from(size).unwrap_or(usize::MAX).min(text.len() - from);
    &text[from..from + length]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_reads_continue_in_the_text_of_the_first() {
        let handles = Handles::new(7);
        let (one, two) = (handles.open(), handles.open());
        assert_ne!(one, two);
        assert_eq!(one >> 32, 7);
        assert_eq!(handles.read(one, 3, 4, 10), None, "nothing read yet");
        handles.keep(one, 3, b"first text");
        for (offset, size, expected) in [
            (6, 10, b"text".as_slice()),
            (6, 2, b"te"),
            (10, 5, b""),
            (u64::MAX, 5, b""),
            (1, u32::MAX, b"irst text"),
        ] {
            assert_eq!(handles.read(one, 3, offset, size).as_deref(), Some(expected));
        }
        assert_eq!(handles.read(one, 3, 0, 10), None, "from the start it is made anew");
        assert_eq!(handles.read(one, 4, 6, 10), None, "another file");
        assert_eq!(handles.read(two, 3, 6, 10), None);
        handles.release(one);
        assert_eq!(handles.read(one, 3, 6, 10), None);
    }

    #[test]
    fn handles_of_an_earlier_daemon_keep_nothing() {
        let handles = Handles::new(7);
        handles.keep(6 << 32 | 1, 3, b"text");
        assert_eq!(handles.read(6 << 32 | 1, 3, 1, 10), None);
    }

    #[test]
    fn texts_are_bounded_and_the_oldest_goes() {
        let handles = Handles::new(1);
        let text = vec![b'x'; MOST_BYTES / 4];
        let opened: Vec<_> = (0..6).map(|_| handles.open()).collect();
        for handle in &opened {
            handles.keep(*handle, 3, &text);
            handles.keep(*handle, 3, &text);
        }
        let kept: Vec<_> = opened.iter().map(|handle| handles.read(*handle, 3, 1, 1).is_some()).collect();
        assert_eq!(kept, [false, false, true, true, true, true]);
        assert_eq!(handles.lock().bytes, MOST_BYTES);
        opened.iter().for_each(|handle| handles.release(*handle));
        assert_eq!(handles.lock().bytes, 0);
        handles.keep(opened[0], 3, &vec![b'x'; MOST_BYTES + 1]);
        assert_eq!(handles.read(opened[0], 3, 1, 1), None);
    }
}
