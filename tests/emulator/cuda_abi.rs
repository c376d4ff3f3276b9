//! What src/cuda/abi.rs declares is what the kernels declare. Two witnesses are asked: the PTX that ships, and the C++ that the emulator
//! runs.
//!
//! The PTX has the members of every shared struct and the parameters of every kernel as text (`ABI_STRUCT` and `KERNEL` in
//! kernels/common/platform.cuh). It has their sizes, the shared memory of kernels, and constants as numbers. No struct has padding, so
//! the order of members says where they lie. The C++ compiler is asked for offsets and types.
//!
//! Without a C++ compiler the trials of the emulator's build are reported as ignored. With `emulator` in `SAMTONE_REQUIRE` they fail
//! instead.

use crate::emulator::Compiler;
use crate::report::{Listed, is_required};
use samtone::cuda::abi::{CONSTANTS, STRUCTS, kernels::STRUCTS as PARAMETERS};
use samtone::cuda::{Architecture, Arithmetic, Cosines, Plan, Problem, Tile};
use samtone::{Call, DType, Loss};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

type Outcome = Result<(), String>;
type Check = fn() -> Outcome;

pub fn trials() -> Vec<Listed> {
    let checks: [(&str, Check); 7] = [
        ("texts of C++ are read", texts),
        ("structs have the members of the PTX", structs),
        ("kernels have the parameters of the PTX", parameters),
        ("constants are those of the PTX", constants),
        ("every constant of the kernels is there", constants_of_kernels),
        ("launches have the threads and the shared memory of the PTX", launches),
        ("what differs is seen", differences),
    ];
    let mut trials: Vec<_> = checks.map(|(name, check)| Listed::new("ptx", name, move || Ok(check()?))).into();
    let absent = Compiler::find().err().filter(|_| !is_required("emulator"));
    for module in modules() {
        let name = format!("the emulator's build of {} lays out structs alike", module.name);
        trials.push(Listed::new("emulator", name, move || Ok(emulated(&module)?)).ignored(absent.clone()));
    }
    trials
}

/// A file of kernels/ptx.
struct Module {
    name: String,
    text: String,
    /// Strings without the 0 at their end.
    strings: BTreeMap<String, String>,
    numbers: BTreeMap<String, f64>,
}

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

fn modules() -> Vec<Module> {
    let files = std::fs::read_dir(kernels().join("ptx")).map(|entries| entries.filter_map(Result::ok));
    let mut paths: Vec<_> = files.into_iter().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let module = |path: &PathBuf| {
        let name = path.file_stem()?.to_string_lossy().into_owned();
        let (text, mut strings, mut numbers) = (std::fs::read_to_string(path).ok()?, BTreeMap::new(), BTreeMap::new());
        for line in text.lines().filter_map(|line| line.strip_prefix(".global .align ")?.strip_suffix(';')) {
            let (declared, value) = line.split_once(" = ").unwrap_or((line, "0"));
            let words: Vec<_> = declared.split_whitespace().collect();
            let [_, kind, constant] = words[..] else { continue };
            if let Some((constant, _)) = constant.split_once('[') {
                let bytes = value.trim_matches(['{', '}']).split(", ").filter_map(|byte| byte.parse().ok());
                let string = String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).trim_end_matches('\0').to_owned();
                strings.insert(constant.to_owned(), string);
            } else if let Some(number) = number(kind, value) {
                numbers.insert(constant.to_owned(), number);
            }
        }
        Some(Module { name, text, strings, numbers })
    };
    paths.iter().filter_map(module).collect()
}

/// A constant of PTX. It writes unsigned numbers as if they had a sign, and floating-point ones as their bits.
fn number(kind: &str, value: &str) -> Option<f64> {
    let whole = || value.parse::<i64>().ok();
    match kind {
        ".u32" => whole().map(|value| f64::from(value as u32)),
        ".u64" => whole().map(|value| value as u64 as f64),
        ".f64" => u64::from_str_radix(value.strip_prefix("0d").unwrap_or("0"), 16).ok().map(f64::from_bits),
        _ => None,
    }
}

/// Name and type of what these declarations of C++ declare, with types as src/cuda/abi.rs has them.
fn declared(declarations: impl Iterator<Item = impl AsRef<str>>) -> Vec<(String, String)> {
    let mut members = Vec::new();
    for declaration in declarations {
        let declaration =
            declaration.as_ref().replace("const ", "").replace("unsigned char", "byte").replace('*', " * ");
        let mut base = "";
        for (k, declarator) in declaration.split(',').enumerate() {
            let mut words: Vec<_> = declarator.split_whitespace().collect();
            if k == 0 && !words.is_empty() {
                base = words.remove(0);
            }
            let pointer = words.first() == Some(&"*");
            let Some(name) = words.last().filter(|_| words.len() == 1 + usize::from(pointer)) else {
                members.push((declarator.to_owned(), "not understood".to_owned()));
                continue;
            };
            let of_rust = match base {
                _ if pointer => "Address",
                "float" => "f32",
                "double" => "f64",
                other => other,
            };
            members.push(match name.strip_suffix(']').and_then(|name| name.split_once('[')) {
                Some((name, length)) => (name.to_owned(), format!("[{of_rust}; {length}]")),
                None => (name.to_string(), of_rust.to_owned()),
            });
        }
    }
    members
}

/// Members of a struct, from the text between and with its braces.
fn members(text: &str) -> Vec<(String, String)> {
    let inner = text.trim().trim_start_matches('{').trim_end_matches('}');
    declared(inner.split(';').filter(|declaration| !declaration.trim().is_empty()))
}

/// A kernel's parameters, from their text.
fn list(text: &str) -> Vec<(String, String)> {
    declared(text.replace("BY_VALUE(", "").replace(')', "").split(','))
}

/// As in the table, in the same form. A flag is a u32 in kernels.
fn table(of: &[(&str, &str, usize)]) -> Vec<(String, String)> {
    of.iter().map(|(name, kind, _)| (name.to_string(), if *kind == "bool" { "u32" } else { kind }.to_owned())).collect()
}

fn same(what: &str, host: &[(String, String)], kernels: &[(String, String)]) -> Outcome {
    if host == kernels {
        return Ok(());
    }
    let lines =
        |members: &[(String, String)]| members.iter().map(|(n, t)| format!("{n}: {t}")).collect::<Vec<_>>().join(", ");
    Err(format!("{what}\n  in src/cuda/abi.rs: {}\n  in kernels/:        {}", lines(host), lines(kernels)))
}

fn demand(condition: bool, otherwise: impl FnOnce() -> String) -> Outcome {
    if condition { Ok(()) } else { Err(otherwise()) }
}

fn texts() -> Outcome {
    let text = "{ u32 begin, end; const double *positive, *weight; Fault* faults[2]; const unsigned char* data; Edge row[MAX]; float x; }";
    let pair = |(name, kind): (&str, &str)| (name.to_owned(), kind.to_owned());
    let want = [
        ("begin", "u32"),
        ("end", "u32"),
        ("positive", "Address"),
        ("weight", "Address"),
        ("faults", "[Address; 2]"),
        ("data", "Address"),
        ("row", "[Edge; MAX]"),
        ("x", "f32"),
    ];
    same("members", &want.map(pair), &members(text))?;
    let want = [("wave", "Wave"), ("at", "Address"), ("n", "u64")].map(pair);
    same("parameters", &want, &list("BY_VALUE(Wave) wave, const AnchorKeys* at, u64 n"))?;
    same("an attribute", &[pair((" volatile u32 n ", "not understood"))], &members("{ volatile u32 n ;}"))
}

/// Every struct that either side has, but those of other kernel files.
fn structs_of(module: &Module) -> Outcome {
    for (constant, text) in &module.strings {
        let Some(name) = constant.strip_suffix("_members") else { continue };
        let (_, host) = STRUCTS
            .iter()
            .find(|(of, _)| *of == name)
            .ok_or_else(|| format!("src/cuda/abi.rs has no `{name}` of {}", module.name))?;
        same(&format!("`{name}` of {}", module.name), &table(host), &members(text))?;
        let (bytes, kernel) = (host.iter().map(|m| m.2).sum::<usize>(), module.numbers.get(&format!("{name}_bytes")));
        let wrong = || format!("`{name}` has {bytes} bytes in src/cuda/abi.rs and {kernel:?} in {}", module.name);
        demand(kernel == Some(&(bytes as f64)), wrong)?;
    }
    Ok(())
}

fn structs() -> Outcome {
    let modules = modules();
    modules.iter().try_for_each(structs_of)?;
    let seen: BTreeSet<_> = modules.iter().flat_map(|m| m.strings.keys()).collect();
    let unknown = STRUCTS.iter().find(|(name, _)| !seen.contains(&format!("{name}_members")));
    demand(unknown.is_none(), || format!("no kernel file has {unknown:?}"))
}

/// Entry points of a module, each with its directives.
fn entries(module: &Module) -> impl Iterator<Item = (&str, &str)> {
    module.text.split(".visible .entry ").skip(1).filter_map(|entry| entry.split_once('('))
}

fn parameters_of(module: &Module) -> Outcome {
    for (entry, _) in entries(module) {
        let host = PARAMETERS.iter().filter(|(kernel, _)| entry.starts_with(kernel)).flat_map(|(_, list)| table(list));
        let text = module.strings.get(&format!("{entry}_parameters"));
        let text = text.ok_or_else(|| format!("{} does not name the parameters of {entry}", module.name))?;
        same(&format!("parameters of {entry}"), &host.collect::<Vec<_>>(), &list(text))?;
    }
    Ok(())
}

fn parameters() -> Outcome {
    let modules = modules();
    modules.iter().try_for_each(parameters_of)?;
    let seen: Vec<_> = modules.iter().flat_map(entries).map(|(entry, _)| entry).collect();
    let unknown = PARAMETERS.iter().find(|(kernel, _)| !seen.iter().any(|entry| entry.starts_with(kernel)));
    demand(!seen.is_empty() && unknown.is_none(), || format!("no kernel has {unknown:?}"))
}

/// Names of the constants in a source of the kernels that the host must know: every `constexpr` outside of functions in a header that has
/// an `ABI_STRUCT`, and every `ABI_CONSTANT`.
fn shared_constants(text: &str, is_header: bool) -> Vec<String> {
    let code: String = text.lines().flat_map(|line| ["\n", line.split("//").next().unwrap_or("")]).collect();
    let all = is_header && code.contains("\nABI_STRUCT(");
    let words = [Some("\nABI_CONSTANT "), all.then_some("\nconstexpr ")].into_iter().flatten();
    let declarations = words.flat_map(|word| code.split(word).skip(1)).filter_map(|rest| rest.split_once(';'));
    let values = declarations.flat_map(|(declaration, _)| declaration.split(','));
    let names = values.filter_map(|value| value.split_once(" = ")?.0.split_whitespace().last());
    names.map(str::to_owned).collect()
}

fn host_has_constants_of(file: &str, text: &str) -> Outcome {
    let names = shared_constants(text, file.ends_with(".cuh"));
    let unknown = names.iter().find(|name| CONSTANTS.iter().all(|(constant, _)| constant != name));
    demand(unknown.is_none(), || format!("src/cuda/abi.rs has no constant {unknown:?} of {file}"))
}

fn constants_of_kernels() -> Outcome {
    let (mut files, mut seen) = (0, 0);
    for folder in [kernels(), kernels().join("common")] {
        for entry in std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok) {
            let (name, text) = (entry.file_name(), std::fs::read_to_string(entry.path()).unwrap_or_default());
            let name = name.to_string_lossy();
            host_has_constants_of(&name, &text)?;
            files += usize::from(name.ends_with(".cu"));
            seen += shared_constants(&text, name.ends_with(".cuh")).len();
        }
    }
    demand(files >= 10 && seen > 30, || format!("{seen} constants in {files} kernel files"))
}

fn constants() -> Outcome {
    let modules = modules();
    for (name, host) in CONSTANTS {
        let found: Vec<_> =
            modules.iter().filter_map(|module| Some((&module.name, module.numbers.get(*name)?))).collect();
        demand(!found.is_empty(), || format!("no kernel file has `{name}`"))?;
        let other = found.iter().find(|(_, kernel)| *kernel != host);
        demand(other.is_none(), || format!("`{name}` is {host} in src/cuda/abi.rs and another number in {other:?}"))?;
    }
    Ok(())
}

/// Of plans that launch every kernel.
fn launches() -> Outcome {
    let about = |error: samtone::Error| error.to_string();
    let modules = modules();
    let mut seen = BTreeSet::new();
    let mut kernels = Vec::new();
    for tile in [Tile::Small, Tile::Large, Tile::Cluster] {
        for arithmetic in [Arithmetic::F16, Arithmetic::F16x2, Arithmetic::F16x3, Arithmetic::Exact] {
            kernels.extend([Cosines::Kept, Cosines::Recomputed].map(|cosines| (tile, arithmetic, cosines)));
        }
    }
    let call = |bytes| Call::new(Loss::samtone_query(), 0.01).with_workspace_bytes(bytes);
    let calls = [call(2 << 20).with_tile_skipping(1e-3), call(4 << 20).with_prefixes([32, 64])];
    for call in &calls {
        for &(tile, arithmetic, cosines) in &kernels {
            let problem = Problem::new(call.pairs(700, 700).map_err(about)?, DType::F32, 64).map_err(about)?;
            let problem = problem.with_architecture(Architecture::Sm90a { multiprocessors: 132 });
            let problem = problem.with_tile(tile).with_arithmetic(arithmetic).with_cosines(cosines);
            let plan = Plan::new(&problem).map_err(about)?;
            for launch in plan.forward().iter().chain(plan.backward()).chain(plan.backward_alone()) {
                let module = modules.iter().find(|module| module.name == launch.module);
                let module = module.ok_or_else(|| format!("no PTX of {launch}"))?;
                let shared = module.numbers.get(&format!("{}_shared_bytes", launch.kernel)).copied().unwrap_or(0.0);
                demand(shared == f64::from(launch.shared_bytes), || format!("{launch}, {shared} B in the PTX"))?;
                let entry = entries(module).find(|(entry, _)| *entry == launch.kernel);
                let threads = entry.and_then(|(_, text)| text.split_once(".maxntid ")?.1.split_once(','));
                let threads = threads.and_then(|(threads, _)| threads.parse().ok());
                demand(threads == Some(launch.threads), || format!("{launch}, {threads:?} threads in the PTX"))?;
                seen.insert(launch.kernel.clone());
            }
        }
    }
    let unseen = modules.iter().flat_map(entries).find(|(entry, _)| !seen.contains(*entry));
    demand(unseen.is_none(), || format!("no plan launches {}", unseen.unwrap_or_default().0))
}

/// Two members of one size and type that change places, another type of the same size, two parameters that change places, a size.
fn differences() -> Outcome {
    let module = |name: &str| modules().into_iter().find(|m| m.name == name).ok_or("no such module".to_owned());
    let changed = |name: &str, constant: &str, from: &str, to: &str| {
        let mut module = module(name)?;
        let text = module.strings.get_mut(constant).ok_or("no such constant")?;
        demand(text.contains(from), || format!("{text} has no {from}"))?;
        *text = text.replacen(from, to, 1);
        Ok::<_, String>(module)
    };
    let structs = [
        changed("combine", "Merge_members", "u32 tile; u32 first;", "u32 first; u32 tile;")?,
        changed("combine", "Edge_members", "u32 begin, end;", "u32 end, begin;")?,
        changed("combine", "Partial_members", "float sum;", "u32 sum;")?,
        changed("prepare", "Packing_members", "u64 row_pitch, panel;", "u64 row_pitch;")?,
    ];
    demand(structs.iter().all(|module| structs_of(module).is_err()), || "a changed struct passes".into())?;
    let parameters = [
        changed(
            "gradient_tile_sm80",
            "gradient_tile_f16_64_parameters",
            "const double* positive, const double* results",
            "const double* results, const double* positive",
        )?,
        changed("skip_squares", "square_masses_parameters", ", u32 together", "")?,
    ];
    demand(parameters.iter().all(|module| parameters_of(module).is_err()), || "changed parameters pass".into())?;
    let header = "#pragma once\nconstexpr u32 QP = 0,\n   NEW = 1; // of both\nABI_STRUCT(A, {\n});\n";
    let file = "constexpr u32 OWN = 1;\nABI_CONSTANT u32 ANOTHER = 2;\n";
    let new = [("a.cuh", header), ("a.cu", file)].map(|(name, text)| host_has_constants_of(name, text).unwrap_err());
    demand(new[0].contains("NEW") && new[1].contains("ANOTHER"), || format!("a new constant passes: {new:?}"))?;
    let mut larger = module("combine")?;
    larger.numbers.entry("Combine_bytes".into()).and_modify(|bytes| *bytes += 8.0);
    demand(structs_of(&larger).is_err(), || "another size passes".into())
}

/// Types and offsets of the structs that a kernel file sees, and its constants, asserted in C++.
fn emulated(module: &Module) -> Outcome {
    let file = kernels().join(format!("{}.cu", module.name));
    let mut text = format!("#include \"{}\"\n#include <cstddef>\n", file.display());
    text += "template <class T> constexpr bool is_pointer = std::is_pointer_v<std::remove_extent_t<T>>;\n";
    let seen = |name: &str| module.strings.contains_key(&format!("{name}_members"));
    let mut assert =
        |condition: String| _ = writeln!(text, "static_assert({condition}, \"src/cuda/abi.rs has another\");");
    for (name, members) in STRUCTS.iter().filter(|(name, _)| seen(name)) {
        let mut offset = 0;
        for (member, kind, bytes) in *members {
            let (base, extent) = match kind.strip_prefix('[').and_then(|kind| kind.strip_suffix(']')?.split_once("; "))
            {
                Some((base, length)) => (base, format!("[{length}]")),
                None => (*kind, String::new()),
            };
            let of_cpp = match base {
                "bool" => "u32",
                "f32" => "float",
                "f64" => "double",
                other => other,
            };
            assert(match of_cpp {
                "Address" => format!("is_pointer<decltype({name}::{member})>"),
                _ => format!("std::is_same_v<decltype({name}::{member}), {of_cpp}{extent}>"),
            });
            assert(format!("offsetof({name}, {member}) == {offset} && sizeof({name}::{member}) == {bytes}"));
            offset += bytes;
        }
        assert(format!("sizeof({name}) == {offset}"));
    }
    for (name, value) in CONSTANTS.iter().filter(|(name, _)| module.numbers.contains_key(*name)) {
        assert(format!("static_cast<double>({name}) == {value:?}"));
    }
    demand(text.lines().count() > 50, || "nothing is asked".into())?;
    Compiler::find()?.check(&format!("abi_{}", module.name), &text, &file)
}
