//! Everything that the server serves and `--out` writes: the page, an index of devices and runs, and two files for each run.

use super::export::{DEVICES, Run, seeded};
use super::output::writable_folder;
use super::support::case::{Case, files};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Files by path, and the runs, by number, that the page reports on.
pub struct Site {
    pub files: BTreeMap<String, Vec<u8>>,
    pub runs: Vec<Run>,
}

/// `index.json`.
#[derive(Serialize)]
struct Index {
    devices: Vec<IndexDevice>,
    runs: Vec<IndexRun>,
}

#[derive(Serialize)]
struct IndexDevice {
    name: &'static str,
    /// What the adapter must have, and the device is asked for.
    features: &'static [&'static str],
    limits: BTreeMap<&'static str, u32>,
    /// What WGSL must have.
    language: &'static [&'static str],
}

#[derive(Serialize)]
struct IndexRun {
    case: String,
    device: &'static str,
    dtype: &'static str,
    expected_loss: f64,
    plan: String,
    contents: String,
}

impl Site {
    /// Every case of a file or folder, and seeded ones of several tiles, for every device that it differs on.
    pub fn new(path: &Path) -> Result<Self> {
        let mut site = Self { files: BTreeMap::new(), runs: Vec::new() };
        for (name, content) in [
            ("index.html", include_str!("page.html")),
            ("page.js", include_str!("page.js")),
            ("replay.js", include_str!("replay.js")),
            ("style.css", include_str!("style.css")),
        ] {
            site.files.insert(name.into(), content.into());
        }
        let mut cases = Vec::new();
        for file in files(path).map_err(anyhow::Error::msg)? {
            cases.push(Case::read(&file).map_err(anyhow::Error::msg)?);
        }
        cases.extend(seeded()?);

        let mut index = Index { devices: Vec::new(), runs: Vec::new() };
        for device in DEVICES {
            index.devices.push(IndexDevice {
                name: device.name,
                features: device.features,
                limits: device.limits.iter().copied().collect(),
                language: device.language,
            });
            for dtype in device.dtypes {
                for case in &cases {
                    let name = &case.problem.name;
                    let (run, exported) = Run::new(case, *dtype, device)
                        .with_context(|| format!("{name} in {dtype} on the device `{}`", device.name))?;
                    let stem = format!("runs/{:04}", site.runs.len());
                    let (plan, contents) = (format!("{stem}.json"), format!("{stem}.bin"));
                    site.files.insert(plan.clone(), serde_json::to_vec(&exported.plan)?);
                    site.files.insert(contents.clone(), exported.contents);
                    for (path, source) in exported.shaders {
                        site.files.insert(path, source.into_bytes());
                    }
                    index.runs.push(IndexRun {
                        case: name.clone(),
                        device: device.name,
                        dtype: dtype.name(),
                        expected_loss: run.expected.loss,
                        plan,
                        contents,
                    });
                    site.runs.push(run);
                }
            }
        }
        site.files.insert("index.json".into(), serde_json::to_vec_pretty(&index)?);
        Ok(site)
    }

    /// Writes every file to a folder that [`check_folder`] accepts, all or none of them.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let draft = tempfile::Builder::new().prefix(".draft-").tempdir_in(folder);
        let draft = draft.with_context(|| format!("cannot write into the folder {}", folder.display()))?;
        for (path, content) in &self.files {
            let path = draft.path().join(path);
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
            }
            std::fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
        }
        for entry in std::fs::read_dir(draft.path())? {
            let entry = entry?;
            let place = folder.join(entry.file_name());
            std::fs::rename(entry.path(), &place).with_context(|| format!("cannot write {}", place.display()))?;
        }
        Ok(())
    }
}

/// Makes the folder, and fails unless it is empty and takes files.
pub fn check_folder(folder: &Path) -> Result<()> {
    writable_folder(folder)?;
    let is_empty = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?.next().is_none();
    ensure!(is_empty, "argument `out` is {}, which is not empty; allowed: a new or an empty folder", folder.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site() -> Site {
        let files = [("index.html", "page"), ("runs/0000.json", "plan"), ("runs/0000.bin", "contents")];
        let files = files.map(|(path, content)| (path.to_string(), content.as_bytes().to_vec()));
        Site { files: files.into(), runs: Vec::new() }
    }

    #[test]
    fn a_site_is_written_whole_and_leaves_no_draft() {
        let folder = tempfile::tempdir().unwrap();
        check_folder(folder.path()).unwrap();
        site().write(folder.path()).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["index.html", "runs"]);
        assert_eq!(std::fs::read(folder.path().join("runs/0000.bin")).unwrap(), b"contents");
        assert!(check_folder(folder.path()).unwrap_err().to_string().contains("which is not empty; allowed: a new or"));
    }

    /// A file that cannot be written leaves none of the others.
    #[test]
    fn a_site_that_cannot_be_written_leaves_the_folder_empty() {
        let folder = tempfile::tempdir().unwrap();
        let mut broken = site();
        broken.files.insert("runs/0000.bin/child".into(), Vec::new());
        broken.write(folder.path()).unwrap_err();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
