//! The conformance suites as one program; see `podhull-conformance --help`.

fn main() -> std::process::ExitCode {
    podhull_tests::conformance::main()
}
