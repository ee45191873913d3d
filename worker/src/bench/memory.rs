//! How much memory the process took at its worst.

use std::fs;

/// The most bytes of this process that were in memory since it began, or since [`forget_peak`].
pub fn peak_resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// Lets the next peak be that of what comes now. Where the kernel refuses, the peak stays that of the whole process.
pub fn forget_peak() {
    // The kernel's word for "reset the peak" (proc(5), clear_refs).
    const RESET_PEAK: &str = "5";
    // Refused in some containers; then the larger figure stands, which is still true.
    let _ = fs::write("/proc/self/clear_refs", RESET_PEAK);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_touched_counts() {
        forget_peak();
        let before = peak_resident_bytes().unwrap();
        let touched = vec![1_u8; 64 << 20];
        let after = peak_resident_bytes().unwrap();
        assert!(after >= before + (32 << 20), "{before} {after} {}", touched.len());
    }
}
