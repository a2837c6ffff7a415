//! Commands on a container whose program has ended in the guest, and whose shadow has not: there is output that nobody has read yet.

use ttrpc::Code;

use super::*;
use crate::agent::stand_in;
use crate::state::Directory;

#[test]
fn who_is_sent_a_signal_after_its_program_has_ended_does_not_run() {
    let root = tempfile::tempdir().unwrap();
    let held = Directory::held(root.path(), "a", Status::Running);
    // Before the guest has deleted it, and after.
    for (code, words) in
        [(Code::FAILED_PRECONDITION, "container not running"), (Code::NOT_FOUND, "container \"a\" does not exist")]
    {
        stand_in::refuse(&held.pod(), code, words);
        let refused = kill(root.path(), "a", libc::SIGTERM, false).unwrap_err();
        assert_eq!(refused.to_string(), "container not running: \"a\" is stopped");
        kill(root.path(), "a", libc::SIGTERM, true).unwrap();
        let paused = pause(root.path(), "a").unwrap_err();
        assert!(matches!(paused, CommandError::NotRunning(..)), "{paused}");
    }
    // What goes wrong otherwise is no end of it.
    stand_in::refuse(&held.pod(), Code::INTERNAL, "signal 15: EPERM");
    let refused = kill(root.path(), "a", libc::SIGTERM, false).unwrap_err();
    assert!(
        matches!(&refused, CommandError::Agent(AgentError::Refused(why)) if why == "signal 15: EPERM"),
        "{refused}"
    );
}

#[test]
fn one_that_is_being_made_has_not_ended() {
    let root = tempfile::tempdir().unwrap();
    let held = Directory::held(root.path(), "a", Status::Creating);
    stand_in::refuse(&held.pod(), Code::NOT_FOUND, "container \"a\" does not exist");
    let refused = kill(root.path(), "a", libc::SIGTERM, false).unwrap_err();
    assert!(matches!(refused, CommandError::Agent(AgentError::Missing(_))), "{refused}");
}
