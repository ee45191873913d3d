//! The compiled kernels, which the binary carries: `worker/kernels/compile.py` makes them.

/// The kernels for one architecture.
#[derive(Debug)]
pub struct Cubin {
    /// NVIDIA's name for it.
    pub architecture: &'static str,
    /// An ELF file.
    pub bytes: &'static [u8],
}

/// One for each architecture, as `compile.py` lists them.
pub const CUBINS: [Cubin; 3] = [
    Cubin { architecture: "sm_80", bytes: include_bytes!("../../../kernels/cubin/sm_80.cubin") },
    Cubin { architecture: "sm_89", bytes: include_bytes!("../../../kernels/cubin/sm_89.cubin") },
    Cubin { architecture: "sm_90a", bytes: include_bytes!("../../../kernels/cubin/sm_90a.cubin") },
];

/// What the cubins were made from and with, as JSON.
pub const MANIFEST: &str = include_str!("../../../kernels/cubin/manifest.json");

/// The kernels for a GPU of this compute capability. A cubin runs on later minor versions too, except those of an "a".
pub(super) fn for_capability(major: i32, minor: i32) -> Option<&'static Cubin> {
    let architecture = match (major, minor) {
        (8, 9) => "sm_89",
        (8, 0..) => "sm_80",
        (9, 0) => "sm_90a",
        _ => return None,
    };
    CUBINS.iter().find(|cubin| cubin.architecture == architecture)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_gets_the_kernels_of_its_own_generation() {
        let name = |major, minor| for_capability(major, minor).map(|cubin| cubin.architecture);
        // A100, A10, L4, H100 and H200; V100, GB200 and RTX 50 have none.
        assert_eq!(
            [name(8, 0), name(8, 6), name(8, 9), name(9, 0)],
            ["sm_80", "sm_80", "sm_89", "sm_90a"].map(Some)
        );
        assert_eq!([name(7, 0), name(9, 1), name(10, 0), name(12, 0)], [None; 4]);
    }
}
