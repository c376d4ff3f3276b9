//! The PTX in kernels/ptx is compiled from the kernel files as they are. Without a compiler this test sees as much as it can: each PTX file
//! names the hash of what it was compiled from. `kernels/compile.py --check` compares the bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

const COMMAND: &str = "python3 kernels/compile.py";

#[derive(Deserialize)]
struct Toolchain {
    wheels: BTreeMap<String, Wheel>,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Wheel {
    version: String,
}

/// How kernel files of one suffix are compiled, and the PTX that comes of it.
#[derive(Deserialize)]
struct Target {
    suffix: String,
    compiler: String,
    options: Vec<String>,
    version: String,
    target: String,
}

impl Toolchain {
    fn read(kernels: &Path) -> Result<Self> {
        Ok(serde_json::from_str(&std::fs::read_to_string(kernels.join("toolchain/toolchain.json"))?)?)
    }

    fn of(&self, stem: &str) -> Result<(&Target, &str)> {
        let target = self.targets.iter().find(|t| stem.ends_with(&t.suffix)).context("no target")?;
        Ok((target, &self.wheels.get(&target.compiler).context("no such compiler")?.version))
    }
}

/// FNV-1a, 64 bits.
fn fnv1a(state: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(state, |state, &byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
const EMPTY: u64 = 0xcbf2_9ce4_8422_2325;

/// The hash that kernels/toolchain/sources.py defines.
fn source_hash(kernels: &Path, file: &str, toolchain: &Toolchain) -> Result<String> {
    let mut texts = BTreeMap::new();
    visit(kernels, file, &mut texts)?;
    let (target, version) = toolchain.of(file.trim_end_matches(".cu"))?;
    let own = texts.remove_entry(file).context("the kernel file itself")?;
    let line = format!("nvrtc {version} {}\n", target.options.join(" "));
    let hash = std::iter::once(own).chain(texts).fold(fnv1a(EMPTY, line.as_bytes()), |state, (name, text)| {
        fnv1a(state, format!("{name}\n{text}\n").as_bytes())
    });
    Ok(format!("{hash:016x}"))
}

fn visit(kernels: &Path, name: &str, texts: &mut BTreeMap<String, String>) -> Result<()> {
    if texts.contains_key(name) {
        return Ok(());
    }
    let text = std::fs::read_to_string(kernels.join(name)).with_context(|| name.to_owned())?.replace("\r\n", "\n");
    texts.insert(name.to_owned(), text.clone());
    for included in text.lines().filter_map(included_header) {
        let beside = normal(&Path::new(name).with_file_name(included));
        let header = if kernels.join(&beside).is_file() { beside } else { normal(Path::new(included)) };
        visit(kernels, &header, texts).with_context(|| format!("{name} includes {included}"))?;
    }
    Ok(())
}

fn included_header(line: &str) -> Option<&str> {
    let directive = line.trim_start_matches([' ', '\t']).strip_prefix('#')?.trim_start_matches([' ', '\t']);
    let (file, _) =
        directive.strip_prefix("include")?.trim_start_matches([' ', '\t']).strip_prefix('"')?.split_once('"')?;
    file.ends_with(".cuh").then_some(file)
}

/// Without `..` and `.`, and with slashes.
fn normal(path: &Path) -> String {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(parts.pop()),
            Component::Normal(part) => parts.push(part.to_string_lossy()),
            _ => {}
        }
    }
    parts.join("/")
}

/// Stems of the files of a folder that end in `.extension`; none where there is no folder.
fn stems(folder: &Path, extension: &str) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    if folder.is_dir() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == extension) {
                found.insert(path.file_stem().context("a name")?.to_string_lossy().into_owned());
            }
        }
    }
    Ok(found)
}

/// Names of the entry points of a PTX file.
fn entries(ptx: &str) -> BTreeSet<&str> {
    ptx.lines().filter_map(|line| Some(line.split_once(".entry ")?.1.split_once('(')?.0)).collect()
}

/// Names of the kernels that a kernel file defines at the beginning of a line. Those that a macro defines are not seen.
fn kernels_of(source: &str) -> BTreeSet<&str> {
    let plain = |name: &&str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    source.lines().filter_map(|line| Some(line.strip_prefix("KERNEL(")?.split_once(',')?.0)).filter(plain).collect()
}

fn value_of<'a>(ptx: &'a str, directive: &str) -> Option<&'a str> {
    ptx.lines().find_map(|line| Some(line.strip_prefix(directive)?.trim()))
}

fn number(version: &str) -> Option<(u32, u32)> {
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Entry points by the stem of their file.
type Listed = BTreeMap<String, Vec<String>>;

/// Everything that is wrong with a folder of kernels, as sentences; and the entry points it has.
fn examine(kernels: &Path) -> Result<(Vec<String>, Listed)> {
    let toolchain = Toolchain::read(kernels)?;
    let (sources, artefacts) = (stems(kernels, "cu")?, stems(&kernels.join("ptx"), "ptx")?);
    let (mut problems, mut listed) = (Vec::new(), BTreeMap::new());
    for stem in artefacts.difference(&sources) {
        problems.push(format!("kernels/ptx/{stem}.ptx has no kernel file: run {COMMAND}"));
    }
    for stem in sources.difference(&artefacts) {
        problems.push(format!("kernels/{stem}.cu was not compiled: run {COMMAND}"));
    }
    for stem in sources.intersection(&artefacts) {
        let file = format!("{stem}.cu");
        let ptx = std::fs::read_to_string(kernels.join(format!("ptx/{stem}.ptx")))?;
        let (target, compiler) = toolchain.of(stem)?;
        let expected = format!("// samtone {} nvrtc {compiler}", source_hash(kernels, &file, &toolchain)?);
        let first = ptx.lines().next().unwrap_or_default();
        if first != expected {
            problems.push(format!(
                "kernels/ptx/{stem}.ptx was not compiled from kernels/{file} as it is: run {COMMAND} \
                 (its first line is \"{first}\", not \"{expected}\")"
            ));
        }
        let version = value_of(&ptx, ".version ").unwrap_or("none");
        if number(version).is_none_or(|v| Some(v) > number(&target.version)) {
            problems.push(format!("kernels/ptx/{stem}.ptx has .version {version}, newer than {}", target.version));
        }
        let built_for = value_of(&ptx, ".target ").unwrap_or("none");
        if built_for != target.target {
            problems.push(format!("kernels/ptx/{stem}.ptx has .target {built_for}, its name says {}", target.target));
        }
        let found = entries(&ptx);
        for kernel in kernels_of(&std::fs::read_to_string(kernels.join(&file))?).difference(&found) {
            problems.push(format!("kernels/ptx/{stem}.ptx has no entry {kernel}, which kernels/{file} defines"));
        }
        listed.insert(stem.clone(), found.iter().map(|&entry| entry.to_owned()).collect());
    }
    Ok((problems, listed))
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn ptx_is_what_the_kernel_files_give() -> Result<()> {
    let (problems, listed) = examine(&repository().join("kernels"))?;
    for (stem, entries) in &listed {
        println!("{stem}: {}", entries.join(", "));
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}

#[test]
fn every_entry_is_in_the_table_of_kernels() -> Result<()> {
    let (_, listed) = examine(&repository().join("kernels"))?;
    if listed.is_empty() {
        return Ok(());
    }
    let table = std::fs::read_to_string(repository().join("docs/kernels.md")).context("docs/kernels.md")?;
    for (stem, entry) in listed.iter().flat_map(|(stem, entries)| entries.iter().map(move |entry| (stem, entry))) {
        let row = format!("| {stem}.cu | `{entry}` |");
        ensure!(table.contains(&row), "docs/kernels.md has no row \"{row}\": run {COMMAND}");
    }
    Ok(())
}

/// A folder of kernels with one that is current.
fn folder_with_one_kernel() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let kernels = folder.path();
    for inner in ["common", "ptx", "toolchain"] {
        std::fs::create_dir(kernels.join(inner))?;
    }
    std::fs::copy(repository().join("kernels/toolchain/toolchain.json"), kernels.join("toolchain/toolchain.json"))?;
    std::fs::write(kernels.join("pack.cu"), "#include \"common/a.cuh\"\nKERNEL(pack, 32, float* x) {\n}\n")?;
    std::fs::write(kernels.join("common/a.cuh"), "#include \"b.cuh\"\n")?;
    std::fs::write(kernels.join("common/b.cuh"), "int b;\n")?;
    let hash = source_hash(kernels, "pack.cu", &Toolchain::read(kernels)?)?;
    let ptx = format!(
        "// samtone {hash} nvrtc 11.8.89\n.version 7.8\n.target sm_80\n\n.visible .entry pack(\n\t.param .u64 x\n)\n"
    );
    std::fs::write(kernels.join("ptx/pack.ptx"), ptx)?;
    Ok(folder)
}

/// Changes a file of the folder, and wants the one problem that this makes.
#[track_caller]
fn assert_found(file: &str, from: &str, to: &str, problem: &str) {
    let folder = folder_with_one_kernel().unwrap();
    let path = folder.path().join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{file} has no {from}");
    std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
    let (problems, _) = examine(folder.path()).unwrap();
    assert!(problems.len() == 1 && problems[0].starts_with(problem), "{problems:?}");
}

#[test]
fn a_current_folder_has_no_problems() -> Result<()> {
    let folder = folder_with_one_kernel()?;
    let (problems, listed) = examine(folder.path())?;
    assert!(problems.is_empty(), "{problems:?}");
    assert_eq!(listed, Listed::from([("pack".to_owned(), vec!["pack".to_owned()])]));
    Ok(())
}

#[test]
fn a_changed_byte_is_found() {
    let stale = "kernels/ptx/pack.ptx was not compiled from kernels/pack.cu as it is: run python3 kernels/compile.py";
    assert_found("pack.cu", "float", "Float", stale);
    assert_found("common/b.cuh", "int b", "int c", stale);
    assert_found("toolchain/toolchain.json", "\"--gpu-architecture=compute_80\"", "\"-G\"", stale);
    assert_found("toolchain/toolchain.json", "11.8.89", "11.8.90", stale);
    assert_found("ptx/pack.ptx", "samtone ", "samtone 0", stale);
}

#[test]
fn a_header_of_another_name_is_found() -> Result<()> {
    let folder = folder_with_one_kernel()?;
    std::fs::rename(folder.path().join("common/b.cuh"), folder.path().join("common/c.cuh"))?;
    let error = format!("{:#}", examine(folder.path()).unwrap_err());
    assert!(error.contains("common/a.cuh includes b.cuh"), "{error}");
    Ok(())
}

#[test]
fn what_the_ptx_says_of_itself_is_compared() {
    let file = "ptx/pack.ptx";
    assert_found(file, ".version 7.8", ".version 8.0", "kernels/ptx/pack.ptx has .version 8.0, newer than 7.8");
    assert_found(file, ".version 7.8", ".version x", "kernels/ptx/pack.ptx has .version x");
    assert_found(
        file,
        ".target sm_80",
        ".target sm_90a",
        "kernels/ptx/pack.ptx has .target sm_90a, its name says sm_80",
    );
    assert_found(file, ".entry pack(", ".entry other(", "kernels/ptx/pack.ptx has no entry pack");
}

#[test]
fn kernel_files_and_ptx_come_in_pairs() -> Result<()> {
    let folder = folder_with_one_kernel()?;
    let (kernel, ptx) = (folder.path().join("pack.cu"), folder.path().join("ptx/pack.ptx"));
    let moved = folder.path().join("pack.txt");
    std::fs::rename(&ptx, &moved)?;
    assert_eq!(examine(folder.path())?.0, ["kernels/pack.cu was not compiled: run python3 kernels/compile.py"]);
    std::fs::rename(&moved, &ptx)?;
    std::fs::remove_file(&kernel)?;
    assert_eq!(examine(folder.path())?.0, ["kernels/ptx/pack.ptx has no kernel file: run python3 kernels/compile.py"]);
    std::fs::remove_file(&ptx)?;
    assert!(examine(folder.path())?.0.is_empty());
    Ok(())
}

/// The same files and number stand in kernels/toolchain/test_toolchain.py.
#[test]
fn the_hash_equals_what_compile_py_computes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    std::fs::create_dir(folder.path().join("common"))?;
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text);
    write("a.cu", "#include \"common/b.cuh\"\r\n#include \"common/emulator.hpp\"\r\nint a;\n")?;
    write("common/b.cuh", "  # include \"c.cuh\" // beside this file\n")?;
    write("common/c.cuh", "#include \"common/b.cuh\"\nint é;")?;
    let toolchain = Toolchain::read(&repository().join("kernels"))?;
    assert_eq!(source_hash(folder.path(), "a.cu", &toolchain)?, "0aaba14c2484491d");
    Ok(())
}

/// Products of f32 that the compiler fused with a sum, or left for the driver's compiler to fuse: by no instruction named in the source.
fn fused_by_compilers(ptx: &str) -> Vec<&str> {
    let (mut products, mut found, mut named) = (BTreeSet::new(), Vec::new(), false);
    for line in ptx.lines().map(str::trim) {
        if line.contains(".entry ") {
            products.clear();
        }
        named = line.contains("begin inline asm") || named && !line.contains("end inline asm");
        let words: Vec<_> = line.trim_end_matches(';').split([' ', '\t', ',']).filter(|w| !w.is_empty()).collect();
        match words.as_slice() {
            ["mul.f32", to, ..] if !named => _ = products.insert(*to),
            ["fma.rn.f32", ..] if !named => found.push(line),
            ["add.f32" | "sub.f32", _, terms @ ..] if terms.iter().any(|t| products.contains(t)) => found.push(line),
            _ => {}
        }
    }
    found
}

/// Gradients have the same bits from kept cosines and from recomputed ones only if both kernels round alike; the emulator, which is compiled
/// without fusing, would not see it.
#[test]
fn kernels_that_differentiate_round_as_their_source_says() -> Result<()> {
    for name in ["gradient_tile_sm80", "gradient_tile_sm90a"] {
        let ptx = std::fs::read_to_string(repository().join("kernels/ptx").join(name).with_extension("ptx"))?;
        let found = fused_by_compilers(&ptx);
        ensure!(found.is_empty(), "{name}.ptx fuses products with sums, where the source has no fma_rn: {found:?}");
    }
    let (begin, end) = ("// begin inline asm", "// end inline asm");
    let named = format!(".visible .entry a(\n{begin}\nmul.rn.f32 %f1, %f2, %f3;\n{end}\nadd.f32 %f4, %f1, %f5;");
    assert!(fused_by_compilers(&named).is_empty());
    assert_eq!(
        fused_by_compilers("mul.f32 \t%f1, %f2, %f3;\n\tadd.f32 \t%f4, %f5, %f1;"),
        ["add.f32 \t%f4, %f5, %f1;"]
    );
    assert_eq!(fused_by_compilers(&format!("{begin}\n{end}\nfma.rn.f32 %f4, %f5, %f1, %f2;")).len(), 1);
    Ok(())
}
