//! What this process was started with beyond its standard streams, as far as it was to be handed on.

use std::os::fd::{FromRawFd, OwnedFd};

use podhull_protocol::MAX_DESCRIPTORS;

use super::{DescriptorError, FIRST};

/// How much a command is to hand on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked {
    /// `--preserve-fds`.
    pub preserve: usize,
    /// Whether `LISTEN_FDS` counts (`sd_listen_fds(3)`), whose descriptors come first.
    pub listen: bool,
}

/// Descriptors to be handed on, from number 3 on.
#[derive(Default)]
pub struct Inherited {
    /// In order.
    pub fds: Vec<OwnedFd>,
    /// How many of them, at the beginning, are those of `LISTEN_FDS`.
    pub listening: usize,
}

impl Inherited {
    /// Takes them; to be called once, and before anything is opened that could have one of their numbers.
    pub fn take(asked: Asked) -> Result<Self, DescriptorError> {
        let variable = |name| std::env::var(name).ok();
        let listening = match asked.listen {
            true => listening(variable("LISTEN_FDS"), variable("LISTEN_PID"), std::process::id()),
            false => 0,
        };
        let count = listening.saturating_add(asked.preserve);
        if count > MAX_DESCRIPTORS {
            return Err(DescriptorError::TooMany(count));
        }
        let fds = (FIRST..).take(count).enumerate().map(|(index, number)| {
            // SAFETY: the call takes no pointers. Nothing in this process has opened anything yet: what is open at the number came
            // from the caller, and is ours alone from here on.
            unsafe {
                if libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) == 0 {
                    return Ok(OwnedFd::from_raw_fd(number));
                }
            }
            Err(match index.checked_sub(listening) {
                Some(index) => DescriptorError::Missing { index, count: asked.preserve, number },
                None => DescriptorError::NotListening { count: listening, number },
            })
        });
        Ok(Self { fds: fds.collect::<Result<_, _>>()?, listening })
    }
}

/// How many descriptors were passed to the process with this number.
fn listening(count: Option<String>, to: Option<String>, process: u32) -> usize {
    let number = |text: Option<String>| text.and_then(|text| text.parse::<u32>().ok());
    match (number(count), number(to)) {
        (Some(count), Some(to)) if to == process => usize::try_from(count).unwrap_or(usize::MAX),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_meant_for_this_process_counts() {
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(listening(text("2"), text("7"), 7), 2);
        assert_eq!(listening(text("2"), text("8"), 7), 0);
        assert_eq!(listening(text("2"), None, 7), 0);
        assert_eq!(listening(None, text("7"), 7), 0);
        assert_eq!(listening(text("-1"), text("7"), 7), 0);
        assert_eq!(listening(text("many"), text("7"), 7), 0);
    }
}
