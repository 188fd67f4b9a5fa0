//! Compiles the .proto files with protox: no system protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = "potstill/v1/attach.proto";
    println!("cargo::rerun-if-changed={file}");
    let descriptors = protox::compile([file], ["."])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
