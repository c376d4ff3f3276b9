//! Everything that the server serves and `--out` writes: the page, an index of devices and runs, and two files for each run.

use crate::export::{DEVICES, Run, seeded};
use crate::support::case::{Case, files};
use anyhow::{Context, Result, bail};
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

    /// Writes every file to a folder that is new or empty.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let at = || folder.display().to_string();
        std::fs::create_dir_all(folder).with_context(at)?;
        if std::fs::read_dir(folder).with_context(at)?.next().is_some() {
            bail!("argument `out` is {}, which is not empty; allowed: a new or an empty folder", folder.display());
        }
        for (path, content) in &self.files {
            let path = folder.join(path);
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
            }
            std::fs::write(&path, content).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}
