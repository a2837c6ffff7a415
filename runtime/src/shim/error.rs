//! Errors as containerd branches on them: codes of gRPC.

use ttrpc::{Code, Error, get_status};

use crate::agent::AgentError;
use crate::bundle::BundleError;
use crate::config::ConfigError;
use crate::machine::MachineError;
use crate::pod::{CommandError, CreateError, ExecError};
use crate::state::StateError;

use super::io::IoError;

/// An error of this code.
pub fn error(code: Code, text: impl Into<String>) -> Error {
    Error::RpcStatus(get_status(code, text.into()))
}

/// There is no such container, or process.
pub fn not_found(text: impl Into<String>) -> Error {
    error(Code::NOT_FOUND, text)
}

/// It is in no state for that.
pub fn not_now(text: impl Into<String>) -> Error {
    error(Code::FAILED_PRECONDITION, text)
}

/// Something of ours failed.
pub fn failed(failure: impl std::fmt::Display) -> Error {
    error(Code::UNKNOWN, failure.to_string())
}

/// What an error says, without its code.
pub fn text(error: &Error) -> String {
    match error {
        Error::RpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    }
}

fn of_state(failure: &StateError) -> Code {
    match failure {
        StateError::Missing(_) => Code::NOT_FOUND,
        StateError::InUse(_) => Code::ALREADY_EXISTS,
        StateError::InvalidId(_) | StateError::ReservedId => Code::INVALID_ARGUMENT,
        _ => Code::UNKNOWN,
    }
}

fn of_bundle(failure: &BundleError) -> Code {
    match failure {
        BundleError::Config(..) | BundleError::TooLong(..) | BundleError::NotAFile(..) => Code::INVALID_ARGUMENT,
        _ => Code::UNKNOWN,
    }
}

/// Who asks again later may have more luck.
fn of_agent(failure: &AgentError) -> Code {
    match failure {
        AgentError::Silent(_) => Code::DEADLINE_EXCEEDED,
        AgentError::Gone(_) | AgentError::Connect(_) => Code::UNAVAILABLE,
        _ => Code::UNKNOWN,
    }
}

fn of_machine(failure: &MachineError) -> Code {
    match failure {
        MachineError::Silent(_) | MachineError::MemoryNotTaken(_) => Code::DEADLINE_EXCEEDED,
        MachineError::Dial(_) | MachineError::Gone => Code::UNAVAILABLE,
        _ => Code::UNKNOWN,
    }
}

fn code_of_command(failure: &CommandError) -> Code {
    match failure {
        CommandError::State(state) => of_state(state),
        CommandError::Agent(agent) => of_agent(agent),
        CommandError::Machine(machine) => of_machine(machine),
        CommandError::Size(_) => Code::INVALID_ARGUMENT,
        CommandError::Started(_)
        | CommandError::Ended(_)
        | CommandError::StartPaused(_)
        | CommandError::NotPaused(..)
        | CommandError::NotRunning(..)
        | CommandError::NotStopped { .. }
        | CommandError::Over(_) => Code::FAILED_PRECONDITION,
        _ => Code::UNKNOWN,
    }
}

/// Of what is done with a container that is there.
pub fn of_command(failure: CommandError) -> Error {
    error(code_of_command(&failure), failure.to_string())
}

/// Of the end of a sandbox. Never that it cannot be reached: containerd takes that for one that is gone, and forgets it.
pub fn of_stop(failure: Error) -> Error {
    match failure {
        Error::RpcStatus(status) if status.code() == Code::UNAVAILABLE => failed(status.message()),
        failure => failure,
    }
}

/// Of a signal: who has ended is nobody any more.
pub fn of_kill(failure: CommandError) -> Error {
    match failure {
        CommandError::NotRunning(..) | CommandError::Agent(AgentError::Missing(_)) => {
            not_found("process already finished")
        }
        failure => of_command(failure),
    }
}

/// Of numbers: containerd asks for those of what has ended, too, and passes over what is not found.
pub fn of_stats(failure: CommandError) -> Error {
    match failure {
        CommandError::Over(_) | CommandError::NotRunning(..) | CommandError::Agent(AgentError::Missing(_)) => {
            not_found(failure.to_string())
        }
        failure => of_command(failure),
    }
}

/// Of the making of a container.
pub fn of_create(failure: CreateError) -> Error {
    let code = match &failure {
        CreateError::State(state) => of_state(state),
        CreateError::Bundle(bundle) => of_bundle(bundle),
        CreateError::Size(_) => Code::INVALID_ARGUMENT,
        CreateError::Resize(resize) => code_of_command(resize),
        CreateError::Machine(machine) => of_machine(machine),
        CreateError::Config(ConfigError::Annotation { .. }) => Code::INVALID_ARGUMENT,
        CreateError::Config(_) => Code::FAILED_PRECONDITION,
        _ => Code::UNKNOWN,
    };
    error(code, failure.to_string())
}

/// Of the execution of a program.
pub fn of_exec(failure: ExecError) -> Error {
    let code = match &failure {
        ExecError::State(state) => of_state(state),
        ExecError::Bundle(bundle) => of_bundle(bundle),
        ExecError::NotRunning(_) | ExecError::Paused(_) => Code::FAILED_PRECONDITION,
        _ => Code::UNKNOWN,
    };
    error(code, failure.to_string())
}

/// Of the standard streams.
pub fn of_io(failure: IoError) -> Error {
    let code = match &failure {
        IoError::Scheme(_) | IoError::Input(_) | IoError::TerminalTo(_) => Code::INVALID_ARGUMENT,
        _ => Code::UNKNOWN,
    };
    error(code, failure.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::pod::SizeError;

    fn code(error: &Error) -> Code {
        let Error::RpcStatus(status) = error else { panic!("{error}") };
        status.code()
    }

    #[test]
    fn who_does_not_answer_is_told_from_who_is_gone() {
        let refused = || std::io::Error::from_raw_os_error(libc::ECONNREFUSED);
        let failures: [(CommandError, Code); 7] = [
            (AgentError::Silent("PauseContainer").into(), Code::DEADLINE_EXCEEDED),
            (AgentError::Gone("closed".into()).into(), Code::UNAVAILABLE),
            (AgentError::Connect(refused()).into(), Code::UNAVAILABLE),
            (AgentError::Refused("no".into()).into(), Code::UNKNOWN),
            (MachineError::Silent(Duration::from_secs(30)).into(), Code::DEADLINE_EXCEEDED),
            (MachineError::Dial(refused()).into(), Code::UNAVAILABLE),
            (SizeError::Memory { asked: 2, host: 1 }.into(), Code::INVALID_ARGUMENT),
        ];
        for (failure, expected) in failures {
            let text = failure.to_string();
            assert_eq!(code(&of_command(failure)), expected, "{text}");
        }
        let resize = CreateError::Resize(SizeError::Memory { asked: 2, host: 1 }.into());
        assert_eq!(code(&of_create(resize)), Code::INVALID_ARGUMENT);
    }

    #[test]
    fn what_containerd_takes_for_an_end_is_said_of_nothing_else() {
        assert_eq!(code(&of_kill(AgentError::Missing("x".into()).into())), Code::NOT_FOUND);
        assert_eq!(code(&of_kill(AgentError::Gone("closed".into()).into())), Code::UNAVAILABLE);
        let stop = of_stop(of_command(AgentError::Gone("closed".into()).into()));
        assert_eq!((code(&stop), text(&stop)), (Code::UNKNOWN, "the agent in the guest is gone: closed".into()));
        assert_eq!(code(&of_stop(not_found("x"))), Code::NOT_FOUND);
    }
}
