//! What has been done so far, and how each of it is taken back: newest first, all of it, whatever fails.

/// One step back; says what failed.
type Step<'a> = Box<dyn FnOnce() -> Vec<String> + 'a>;

/// The steps of an undertaking that is not finished.
#[derive(Default)]
pub struct Undo<'a> {
    steps: Vec<Step<'a>>,
}

impl<'a> Undo<'a> {
    pub fn push(&mut self, step: impl FnOnce() -> Vec<String> + 'a) {
        self.steps.push(Box::new(step));
    }

    /// Takes everything back. Returns what failed, which the caller tells with the failure that led here.
    pub fn run(self) -> Vec<String> {
        self.steps.into_iter().rev().flat_map(|step| step()).collect()
    }

    /// The undertaking is finished: nothing is to be taken back any more.
    pub fn forget(mut self) {
        self.steps.clear();
    }
}

/// For steps that fail in one way only.
pub fn told<T, E: std::fmt::Display>(result: Result<T, E>) -> Vec<String> {
    result.err().map(|error| error.to_string()).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn steps_are_taken_back_newest_first_whatever_fails() {
        let seen = RefCell::new(Vec::new());
        let mut undo = Undo::default();
        for number in 0..3 {
            let seen = &seen;
            undo.push(move || {
                seen.borrow_mut().push(number);
                vec![format!("failed {number}")]
            });
        }
        assert_eq!(undo.run(), ["failed 2", "failed 1", "failed 0"]);
        assert_eq!(*seen.borrow(), [2, 1, 0]);
    }
}
