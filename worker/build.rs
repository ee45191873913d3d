//! Writes where libtorch lies into the binary's run path, so that `target/*/darkroom-worker` starts without
//! `LD_LIBRARY_PATH`. DT_RPATH and not DT_RUNPATH, because libtorch_cpu's own dependencies (libcudart,
//! libcupti) are searched with it too.
//!
//! And compiles `cuda/shim.cpp`, which the program carries and opens on a machine with a GPU. Its symbols stay open, so no
//! CUDA library is needed here, only headers: libtorch's and those that `make deps` puts beside it. Without them the program
//! is built without the shim and says so where it is asked for.
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let libtorch = env::var_os("LIBTORCH").map(PathBuf::from);
    if let Some(libtorch) = &libtorch {
        println!(
            "cargo:rustc-link-arg=-Wl,--disable-new-dtags,-rpath,{}/lib,-rpath,$ORIGIN/../lib",
            libtorch.display()
        );
    }
    let shim = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("cuda_shim.so");
    if let Err(reason) = compile_shim(libtorch.as_deref(), &shim) {
        println!("cargo:warning=built without what CUDA graphs and fixed kernels on a GPU need: {reason}");
        fs::write(&shim, []).expect("OUT_DIR can be written to");
    }
}

/// The shared object at `shim`, or why there is none.
fn compile_shim(libtorch: Option<&Path>, shim: &Path) -> Result<(), String> {
    const SOURCE: &str = "cuda/shim.cpp";
    println!("cargo:rerun-if-changed={SOURCE}");
    println!("cargo:rerun-if-env-changed=CXX");
    let libtorch = libtorch.ok_or("LIBTORCH is not set")?;
    let deps = libtorch.parent().unwrap_or(libtorch);
    let includes = [libtorch.join("include"), deps.join("cuda-headers/include")];
    // `make deps` renews it when it has put headers there.
    let stamp = libtorch.join("VERSION");
    if stamp.exists() {
        println!("cargo:rerun-if-changed={}", stamp.display());
    }
    if let Some(missing) = includes.iter().find(|include| !include.is_dir()) {
        return Err(format!("{} is not there; `make deps` fetches it", missing.display()));
    }
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-s", "-D_GLIBCXX_USE_CXX11_ABI=1"])
        .args(includes.iter().flat_map(|include| [Path::new("-I"), include]))
        .args([Path::new("-o"), shim, Path::new(SOURCE)])
        .output()
        .map_err(|error| format!("{compiler}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{compiler} says: {}", said.lines().next().unwrap_or_default()))
}
