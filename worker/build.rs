//! Writes where libtorch lies into the binary's run path, so that `target/*/darkroom-worker` starts without
//! `LD_LIBRARY_PATH`. DT_RPATH and not DT_RUNPATH, because libtorch_cpu's own dependencies (libcudart,
//! libcupti) are searched with it too.
use std::env;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Ok(libtorch) = env::var("LIBTORCH") {
        println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags,-rpath,{libtorch}/lib,-rpath,$ORIGIN/../lib");
    }
}
