//! Independent readers: 7-Zip for every image, QEMU for images without a parent.

use std::path::Path;
use std::process::Command;

/// Everything that 7-Zip reads from the disk of an image. It finds parents in the directory of the image, by
/// the name in the header.
///
/// # Panics
/// If 7-Zip is not installed (Debian packages 7zip, p7zip-full).
pub fn seven_zip_reads(image: &Path) -> Result<Vec<u8>, String> {
    let run = |program: &str| {
        Command::new(program)
            .args(["x", "-so", "-tvhd", "-bd"])
            .arg(image.file_name().unwrap())
            .current_dir(image.parent().unwrap())
            .env("LC_ALL", "C.UTF-8")
            .output()
    };
    let output = run("7z").or_else(|_| run("7zz")).expect("7z or 7zz is needed: scripts/install-deps");
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Everything that QEMU reads from the disk of an image, cut to `size`: its driver goes by whole blocks of
/// the geometry for some creators.
pub fn qemu_reads(image: &Path, size: u64) -> Result<Vec<u8>, String> {
    let raw = image.with_extension("judged");
    let output = Command::new("qemu-img")
        .args(["convert", "-f", "vpc", "-O", "raw"])
        .args([image, &raw])
        .output()
        .expect("qemu-img is needed: scripts/install-deps");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let mut bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    bytes.truncate(size as usize);
    Ok(bytes)
}
