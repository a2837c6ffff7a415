//! The measurements as one program; see `podhull-bench --help`.

fn main() -> std::process::ExitCode {
    podhull_tests::bench::main()
}
