//! Files that are there whole or not at all.
#![allow(dead_code)] // every program that includes this uses another part of it

use anyhow::{Context, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Makes the folder, and fails unless files can be written into it: before the work whose results they hold, not after it.
pub fn writable_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create the folder {}", folder.display()))?;
    let probe = beside(&folder.join("probe"));
    let made = File::create(&probe).with_context(|| format!("cannot write into the folder {}", folder.display()));
    made.and_then(|file| {
        drop(file);
        fs::remove_file(&probe).with_context(|| format!("cannot remove {}", probe.display()))
    })
}

/// [`writable_folder`] of the folder that `file` is to be in.
pub fn writable_place(file: &Path) -> Result<()> {
    anyhow::ensure!(!file.is_dir(), "{} is a folder; allowed: the name of a file", file.display());
    writable_folder(file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

/// Has `write` write a file beside `path`, and moves it there when it is complete. A full disk or an interrupt leaves at `path`
/// what was there before.
pub fn whole_file(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let draft = beside(path);
    let written = write(&draft)
        .and_then(|()| Ok(File::open(&draft)?.sync_all()?))
        .and_then(|()| Ok(fs::rename(&draft, path)?))
        .with_context(|| format!("cannot write {}", path.display()));
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written
}

/// [`whole_file`] with this content.
pub fn whole_content(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    whole_file(path, |draft| Ok(fs::write(draft, content)?))
}

/// A name in the same folder that no other process takes, of the same kind.
fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{}.{name}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    #[test]
    fn what_was_there_outlives_a_failure() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.json");
        whole_content(&path, "old").unwrap();
        let failed = whole_file(&path, |draft| {
            fs::write(draft, "ne")?;
            bail!("no space left on device")
        });
        let sentence = format!("{:#}", failed.unwrap_err());
        assert_eq!(sentence, format!("cannot write {}: no space left on device", path.display()));
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        whole_content(&path, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "drafts are left");
    }

    /// As root there is no folder without permission, but in this one nobody can make files.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_folder_that_takes_no_files_is_named() {
        for sentence in [writable_folder(Path::new("/proc")), writable_place(Path::new("/proc/report.html"))] {
            let sentence = format!("{:#}", sentence.unwrap_err());
            assert!(sentence.starts_with("cannot write into the folder /proc: "), "{sentence}");
        }
    }

    #[test]
    fn a_writable_folder_is_left_empty() {
        let folder = tempfile::tempdir().unwrap();
        let made = folder.path().join("a/b");
        writable_folder(&made).unwrap();
        assert_eq!(fs::read_dir(&made).unwrap().count(), 0);
        let sentence = writable_place(&made).unwrap_err().to_string();
        assert!(sentence.ends_with("is a folder; allowed: the name of a file"), "{sentence}");
    }
}
