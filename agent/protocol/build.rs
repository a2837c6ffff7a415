//! Generates the messages and the ttrpc client and server from the one `.proto`.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .run()
        .expect("agent.proto compiles");
    // The generated mod.rs names the messages alone; a module's own file is what lets both carry inner attributes.
    std::fs::write(out.join("mod.rs"), "pub mod agent;\npub mod agent_ttrpc;\n").expect("OUT_DIR is writable");
}
