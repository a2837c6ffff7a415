//! The end-to-end tests as one program; see `podhull-e2e --help`.

fn main() -> std::process::ExitCode {
    podhull_tests::suite::main()
}
