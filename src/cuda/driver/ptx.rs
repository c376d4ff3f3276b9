//! The kernels as PTX, and what their text says before any driver reads it.

use crate::error::{Error, Result};
use std::borrow::Cow;

/// A file of kernels/ptx.
pub(super) struct Module {
    /// Its name, without `.ptx`.
    pub name: &'static str,
    /// Its text. The last byte is 0, as the driver demands.
    text: &'static str,
}

macro_rules! modules {
    ($($name:literal)*) => {
        /// Every file of kernels/ptx.
        const MODULES: &[Module] = &[$(Module {
            name: $name,
            text: concat!(include_str!(concat!("../../../kernels/ptx/", $name, ".ptx")), "\0"),
        }),*];
    };
}

modules! {
    "prepare" "combine" "project" "skip_squares" "prepare_prefixes" "prefixes" "project_prefixes"
    "logsumexp_sm80" "gradient_tile_sm80" "gradient_product_sm80" "logsumexp_prefixes_sm80" "gradient_tile_prefixes_sm80"
    "logsumexp_sm90a" "gradient_tile_sm90a" "gradient_product_sm90a" "logsumexp_prefixes_sm90a" "gradient_tile_prefixes_sm90a"
}

/// The module of that name.
pub(super) fn module(name: &str) -> Option<&'static Module> {
    MODULES.iter().find(|module| module.name == name)
}

/// The PTX version that a driver must read for any plan to run: the latest one among the files for every device.
pub(super) fn oldest_version() -> (u32, u32) {
    MODULES.iter().filter(|m| m.target() == "sm_80").map(Module::version).max().unwrap_or((7, 8))
}

/// Whether a driver that supports this version of CUDA reads the PTX that is for compute capability 9.0 alone.
pub(super) fn reads_hopper(supported: (u32, u32)) -> bool {
    MODULES.iter().filter(|m| m.target() == "sm_90a").all(|m| m.expect_driver(supported).is_ok())
}

impl Module {
    /// The text for a device, with the 0 that ends it. Kernels begin with two instructions that only compute capability 9.0 and later has.
    /// The PTX for every device has them as comments. For devices that have the instructions, this turns the comments into instructions.
    pub(super) fn image(&self, capability: (u32, u32)) -> Cow<'static, [u8]> {
        if capability < (9, 0) || self.target() != "sm_80" {
            return Cow::Borrowed(self.text.as_bytes());
        }
        let later = self.text.replacen("\n.target sm_80\n", "\n.target sm_90\n", 1);
        Cow::Owned(later.replace("// griddepcontrol.", "griddepcontrol.").into_bytes())
    }

    /// The rest of the first line that begins with the directive `name`.
    fn directive(&self, name: &str) -> Option<&'static str> {
        self.text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
    }

    /// `.version`, major and minor.
    pub(super) fn version(&self) -> (u32, u32) {
        let version = self.directive(".version ").and_then(|v| v.split_once('.'));
        version.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?))).unwrap_or((u32::MAX, 0))
    }

    /// `.target`, such as `sm_80`.
    fn target(&self) -> &'static str {
        self.directive(".target ").unwrap_or_default()
    }

    /// An error unless a driver that supports this version of CUDA reads this PTX.
    pub(super) fn expect_driver(&self, supported: (u32, u32)) -> Result<()> {
        expect_driver(self.version(), supported)
    }

    /// Bytes of each parameter of an entry point; `None` if there is no such entry point.
    pub(super) fn parameters(&self, entry: &str) -> Option<Vec<usize>> {
        let start = format!(".entry {entry}(");
        let (_, rest) = self.text.split_once(&start)?;
        let (list, _) = rest.split_once(')')?;
        list.split(',').map(str::trim).filter(|declaration| !declaration.is_empty()).map(parameter_bytes).collect()
    }
}

/// An error unless a driver that supports this version of CUDA reads PTX of this version.
pub(super) fn expect_driver(ptx: (u32, u32), supported: (u32, u32)) -> Result<()> {
    let needed = driver_for(ptx);
    if supported < needed { Err(Error::DriverTooOld { supported, ptx, needed }) } else { Ok(()) }
}

/// Bytes of a parameter that is declared like `.param .u64 x` or `.param .align 8 .b8 x[96]`.
fn parameter_bytes(declaration: &str) -> Option<usize> {
    let kind = declaration.split_whitespace().rfind(|word| word.starts_with('.'))?;
    let bits: usize = kind.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().ok()?;
    let count = match declaration.split_once('[') {
        Some((_, length)) => length.strip_suffix(']')?.parse().ok()?,
        None => 1,
    };
    Some(bits / 8 * count)
}

/// The version of CUDA that brought a version of PTX. A driver for that CUDA reads this PTX and older ones.
pub(super) fn driver_for(ptx: (u32, u32)) -> (u32, u32) {
    match ptx {
        (major, minor) if major < 8 => (major + 4, minor),
        (8, minor @ 0..=5) => (12, minor),
        (8, minor) => (12, minor + 1), // CUDA 12.6 brought no version of PTX
        (major, minor) => (major + 4, minor),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{Architecture, Arithmetic, Cosines, Plan, Problem, Tile};
    use crate::{Block, Call, DType, Group, Loss};
    use std::path::Path;

    #[test]
    fn every_file_is_here_and_says_what_it_needs() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/ptx");
        let mut names = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            let module = module(&name).unwrap_or_else(|| unreachable!("src/cuda/driver/ptx.rs does not list {name}"));
            assert!(module.target().starts_with("sm_"), "{name} is for {:?}", module.target());
            assert!(module.version() < (100, 0), "{name} is PTX {:?}", module.version());
            assert!(module.text.ends_with('\0'));
            names += 1;
        }
        assert_eq!(names, MODULES.len());
    }

    /// A launch may begin before the previous one is complete only because its kernel waits.
    #[test]
    fn every_kernel_waits_for_earlier_launches_where_they_may_overlap() {
        for module in MODULES {
            let entries = module.text.matches(".entry ").count();
            let text = |capability| String::from_utf8(module.image(capability).into_owned()).unwrap();
            let lines = |text: &str, line| text.lines().filter(|l| l.trim() == line).count();
            for capability in [(9, 0), (12, 0)] {
                let text = text(capability);
                assert_eq!(lines(&text, "griddepcontrol.wait;"), entries, "{}", module.name);
                assert_eq!(lines(&text, "griddepcontrol.launch_dependents;"), entries, "{}", module.name);
                let target = if module.name.ends_with("_sm90a") { ".target sm_90a" } else { ".target sm_90" };
                assert_eq!(lines(&text, target), 1, "{}", module.name);
                assert!(text.ends_with('\0'));
            }
            if module.target() == "sm_80" {
                let text = text((8, 9));
                assert_eq!(text, module.text);
                assert_eq!(lines(&text, "// griddepcontrol.wait;"), entries, "{}", module.name);
                assert_eq!(text.matches("griddepcontrol").count(), 2 * entries, "{}", module.name);
            }
        }
    }

    #[test]
    fn versions_of_ptx_are_those_of_cuda() {
        assert_eq!(
            [(7, 8), (8, 0), (8, 5), (8, 7), (9, 0)].map(driver_for),
            [(11, 8), (12, 0), (12, 5), (12, 8), (13, 0)]
        );
        let error = expect_driver((7, 8), (11, 4)).unwrap_err().to_string();
        assert!(error.contains("11.4") && error.contains("7.8") && error.contains("11.8 or later"), "{error}");
        assert_eq!(expect_driver((7, 8), (13, 0)), Ok(()));
    }

    #[test]
    fn parameters_are_read_from_the_text() {
        let text = ".visible .entry scale(\n\t.param .u64 scale_param_0,\n\t.param .align 8 .b8 scale_param_1[904],\n\
                    \t.param .u32 scale_param_2,\n\t.param .f64 scale_param_3\n)\n.visible .entry idle()\n\0";
        let module = Module { name: "test", text };
        assert_eq!(module.parameters("scale"), Some(vec![8, 904, 4, 8]));
        assert_eq!(module.parameters("idle"), Some(vec![]));
        assert_eq!(module.parameters("cale"), None);
        assert_eq!(module.version().0, u32::MAX, "PTX without a version is refused by every driver");
    }

    /// The driver copies as many bytes of each parameter as the PTX declares. If the plan had fewer, it would read beyond them.
    #[test]
    fn plans_launch_entries_with_the_parameters_of_the_ptx() {
        let positives = [2, 2, 0, 5, 4];
        let plain = Call::new(Loss::samtone_both(), 0.05).with_tile_skipping(0.01);
        let shared = Call::new(Loss::samtone_query(), 0.05).with_tile_skipping(0.01).with_positives(positives);
        let prefixes = Call::new(Loss::samtone_query(), 0.05).with_positives(positives).with_prefixes([5, 7, 24]);
        for call in [plain, shared, prefixes] {
            for (arithmetic, tile) in [
                (Arithmetic::F16, Tile::Small),
                (Arithmetic::F16, Tile::Large),
                (Arithmetic::F16x2, Tile::Small),
                (Arithmetic::F16x2, Tile::Large),
                (Arithmetic::F16x3, Tile::Small),
                (Arithmetic::F16x3, Tile::Large),
                (Arithmetic::Exact, Tile::Small),
                (Arithmetic::F16, Tile::Cluster),
                (Arithmetic::F16x2, Tile::Cluster),
                (Arithmetic::F16x3, Tile::Cluster),
            ] {
                let problem = Problem::new(call.pairs(5, 7).unwrap(), DType::F32, 24).unwrap();
                let problem = problem.with_architecture(Architecture::Sm90a { multiprocessors: 132 });
                let problem = problem.with_arithmetic(arithmetic).with_tile(tile).with_cosines(Cosines::Kept);
                let plan = Plan::new(&problem).unwrap();
                for launch in plan.forward().iter().chain(plan.backward()).chain(plan.backward_alone()) {
                    let wanted = module(launch.module).unwrap().parameters(&launch.kernel);
                    let given: Vec<_> = launch.arguments.iter().map(|a| a.bytes.len()).collect();
                    assert_eq!(wanted, Some(given), "{launch}");
                }
            }
        }
    }

    /// Every launch has at least one thread block, no more than a driver takes, and no more shared memory than the device with the least
    /// has.
    #[test]
    fn plans_launch_what_every_device_takes() {
        let only = |block| Loss::custom("only", vec![Group::new(1.0, &[block], 1).unwrap()]).unwrap();
        let presets = Loss::PRESETS.iter().map(|(name, ..)| Loss::by_name(name).unwrap());
        for loss in presets.chain([Block::QP, Block::PQ, Block::QQ, Block::PP].map(only)) {
            let plain = Call::new(loss, 0.05).with_tile_skipping(0.01);
            let crowded = plain.clone().with_positives([0, 0, 0]);
            let prefixes = Call::new(plain.loss().clone(), 0.05).with_prefixes([1, 2, 3]);
            let short = prefixes.clone().with_prefixes([1]).with_positives([0, 0, 0]);
            let pairs = [plain.pairs(1, 1), plain.pairs(3, 200), crowded.pairs(3, 3)];
            let of_prefixes = [prefixes.pairs(1, 1), prefixes.pairs(3, 200), short.pairs(3, 3)];
            for pairs in pairs.into_iter().chain(of_prefixes).map(Result::unwrap) {
                for rows in [0..pairs.rows(), pairs.rows() - 1..pairs.rows()] {
                    for tile in [Tile::Small, Tile::Large, Tile::Cluster] {
                        let problem = Problem::new(pairs, DType::BF16, 3).unwrap();
                        let problem = problem.with_rows(rows.clone()).unwrap().with_tile(tile);
                        let problem = problem.with_architecture(Architecture::Sm90a { multiprocessors: 132 });
                        let problem = problem.with_cosines(Cosines::Kept);
                        let plan = Plan::new(&problem).unwrap();
                        for launch in plan.forward().iter().chain(plan.backward()).chain(plan.backward_alone()) {
                            let ([x, y], threads, bytes) = (launch.grid, launch.threads, launch.shared_bytes);
                            assert!((1..1 << 31).contains(&x) && (1..1 << 16).contains(&y), "{launch} of {plan}");
                            let most = if launch.module.ends_with("_sm90a") { 227 << 10 } else { 99 << 10 };
                            assert!((1..=1024).contains(&threads) && bytes <= most, "{launch} of {plan}");
                        }
                    }
                }
            }
        }
    }
}
