//! A small Kubernetes with pods of podhull and of runc as one program; see `podhull-kubernetes --help`.

fn main() -> std::process::ExitCode {
    podhull_tests::kubernetes::main()
}
