//! The default data: documented functions of the crates whose sources cargo keeps on this machine.

use super::data::Pair;
use super::doc_pairs::for_each_documented_function;
use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// Larger files are generated bindings and tables.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Crates are read in groups of this size until enough pairs are there: a machine may keep thousands.
const CRATES_AT_ONCE: usize = 64;

/// What was read.
pub struct Collected {
    /// Pairs, grouped by the name of their crate.
    pub pairs: Vec<Pair>,
    /// One sentence for the report.
    pub source: String,
}

/// Up to about `max_pairs` pairs, and no more than `max_per_crate` of any crate name, from the sources under cargo's home.
/// The same crates give the same pairs for the same seed.
pub fn collect(max_pairs: usize, max_per_crate: usize, seed: u64) -> Result<Collected> {
    let root = cargo_home()?.join("registry").join("src");
    let mut crates = crate_folders(&root)?;
    // By hash, so that a machine with more crates than needed gives a mixture and not those with an early letter. The
    // versions of one crate stay together: both must meet the same cap.
    crates.sort_by_cached_key(|(name, folder)| (super::data::text_hash(name, seed), folder.clone()));
    let mut pairs = Vec::new();
    let mut names = 0;
    let mut rest = crates.as_slice();
    while !rest.is_empty() && pairs.len() < max_pairs {
        let mut cut = CRATES_AT_ONCE.min(rest.len());
        while cut < rest.len() && rest[cut].0 == rest[cut - 1].0 {
            cut += 1;
        }
        let (now, later) = rest.split_at(cut);
        rest = later;
        let by_crate: Vec<Vec<Pair>> = now
            .chunk_by(|a, b| a.0 == b.0)
            .collect::<Vec<_>>()
            .into_par_iter()
            .map(|versions| sample(versions.iter().flat_map(read_crate).collect(), max_per_crate, seed))
            .collect();
        names += by_crate.iter().filter(|pairs| !pairs.is_empty()).count();
        pairs.extend(by_crate.into_iter().flatten());
    }
    pairs.truncate(max_pairs);
    Ok(Collected { pairs, source: format!("documented functions of {names} Rust crates in cargo's registry") })
}

/// Cargo's own rule: $CARGO_HOME, else .cargo in the home folder.
fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("CARGO_HOME").filter(|h| !h.is_empty()) {
        return Ok(home.into());
    }
    let home = std::env::home_dir().context(
        "the home folder is unknown and CARGO_HOME is not set, so the sources kept by cargo cannot be found; set CARGO_HOME, \
         or give pairs with --pairs FILE or --beir FOLDER",
    )?;
    Ok(home.join(".cargo"))
}

/// (crate name, folder) of every crate version under every registry.
fn crate_folders(root: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut crates = Vec::new();
    let folders = |path: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|e| e.path()).filter(|p| p.is_dir()).collect()
    };
    for registry in folders(root) {
        for folder in folders(&registry) {
            let Some(name) = folder.file_name().and_then(|n| n.to_str()) else { continue };
            crates.push((crate_name(name).to_string(), folder));
        }
    }
    if crates.is_empty() {
        bail!(
            "no crate sources in {}; run `cargo fetch` in any project with dependencies, set CARGO_HOME, or give pairs with \
             --pairs FILE or --beir FOLDER",
            root.display()
        );
    }
    Ok(crates)
}

/// `serde_json` of `serde_json-1.0.140`: what stands before the first dash that a number and a full stop follow.
fn crate_name(folder: &str) -> &str {
    let end = folder
        .match_indices('-')
        .find(|(at, _)| {
            let major = folder[at + 1..].split_once('.').map_or("", |(major, _)| major);
            !major.is_empty() && major.bytes().all(|b| b.is_ascii_digit())
        })
        .map_or(folder.len(), |(at, _)| at);
    &folder[..end]
}

fn read_crate((name, folder): &(String, PathBuf)) -> Vec<Pair> {
    let files = walkdir::WalkDir::new(folder).sort_by_file_name().into_iter().flatten().filter(|entry| {
        entry.file_type().is_file()
            && entry.path().extension().is_some_and(|e| e == "rs")
            && entry.metadata().is_ok_and(|m| m.len() <= MAX_FILE_BYTES)
    });
    let mut pairs = Vec::new();
    for file in files {
        // A file that is not UTF-8 is no Rust source.
        let Ok(text) = std::fs::read_to_string(file.path()) else { continue };
        for_each_documented_function(&text, |query, passage| {
            pairs.push(Pair { query, passage: passage.to_string(), group: Some(name.clone()) });
        });
    }
    pairs
}

/// At most `count` of the pairs, drawn at random and left in order.
fn sample(pairs: Vec<Pair>, count: usize, seed: u64) -> Vec<Pair> {
    let total = pairs.len();
    if total <= count {
        return pairs;
    }
    let mut keep = super::data::sample_indices(total, count, seed).into_iter().peekable();
    pairs.into_iter().enumerate().filter_map(|(i, pair)| keep.next_if_eq(&i).map(|_| pair)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crate_names() {
        for (folder, name) in [
            ("serde_json-1.0.140", "serde_json"),
            ("gemm-f16-0.19.0", "gemm-f16"),
            ("x-2d-1.0.0-rc.1+wasi-0.2.4", "x-2d"),
            ("md-5-0.10.6", "md-5"),
            ("windows-sys-0.61.2", "windows-sys"),
            ("no-version", "no-version"),
        ] {
            assert_eq!(crate_name(folder), name, "{folder}");
        }
    }
}
