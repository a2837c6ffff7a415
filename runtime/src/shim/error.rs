//! Errors as containerd branches on them: codes of gRPC.

use ttrpc::{Code, Error, get_status};

use crate::agent::AgentError;
use crate::bundle::BundleError;
use crate::config::ConfigError;
use crate::pod::{CommandError, CreateError, ExecError};
use crate::state::StateError;

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

/// Of what is done with a container that is there.
pub fn of_command(failure: CommandError) -> Error {
    let code = match &failure {
        CommandError::State(state) => of_state(state),
        CommandError::Started(_)
        | CommandError::Ended(_)
        | CommandError::StartPaused(_)
        | CommandError::NotPaused(..)
        | CommandError::NotRunning(..)
        | CommandError::NotStopped { .. }
        | CommandError::Over(_) => Code::FAILED_PRECONDITION,
        _ => Code::UNKNOWN,
    };
    error(code, failure.to_string())
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
