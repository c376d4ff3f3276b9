//! samtone's shaders as kernels of cubecl, which compiles each once, keeps it, and dispatches it in the order of burn's own.

use burn::cubecl::ir::metadata::Info;
use burn::cubecl::ir::settings::Dim3;
use burn::cubecl::ir::{ElemType, UIntKind};
use burn::cubecl::prelude::{
    AddressType, CubeKernel, ExecutionMode, KernelDefinition, KernelId, KernelMetadata, KernelSettings,
    PrecompiledSource, Scope,
};
use samtone::wgpu::{Dispatch, Module, Variant};

/// One entry point, with the numbers of the bindings that it is dispatched with.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Shader {
    module: Module,
    entry: &'static str,
    variant: Variant,
    numbers: Vec<u32>,
}

impl Shader {
    pub(super) fn of(dispatch: &Dispatch, variant: Variant) -> Self {
        let numbers = dispatch.bindings.iter().map(|binding| binding.index).collect();
        Self { module: dispatch.module, entry: dispatch.entry, variant, numbers }
    }

    /// WGSL as cubecl binds it: buffers have the numbers 0, 1, … in the order of the arguments, and the parameters, which come
    /// first in a plan, have the last. Buffers that the entry point does not touch go behind these, where none is bound.
    ///
    /// Tensors share large buffers, and none may be bound for reading and for writing at once, so all are bound for writing. The
    /// parameters are in a buffer of their own, and stay uniform.
    fn wgsl(&self) -> String {
        const NUMBER: &str = "@binding(";
        let mut unused = self.numbers.len();
        let source = self.module.source(self.variant, false);
        let mut rewritten = String::with_capacity(source.len());
        let mut parts = source.split(NUMBER);
        rewritten.extend(parts.next());
        for part in parts {
            let (number, rest) = part.split_once(')').unwrap_or((part, ""));
            let place = self.numbers.iter().position(|n| number.parse() == Ok(*n));
            let number = match place {
                Some(0) => self.numbers.len() - 1,
                Some(place) => place - 1,
                None => {
                    unused += 1;
                    unused - 1
                }
            };
            rewritten.push_str(&format!("{NUMBER}{number}){rest}"));
        }
        rewritten.replace("var<storage, read>", "var<storage, read_write>")
    }
}

impl KernelMetadata for Shader {
    fn name(&self) -> &'static str {
        self.entry
    }

    fn id(&self) -> KernelId {
        // Without counters that end every loop, which keep compilers from unrolling: every loop of the shaders ends, since its
        // bound is a constant or in what plans say.
        KernelId::new::<Self>().mode(ExecutionMode::Unchecked).info(self.clone())
    }

    fn address_type(&self) -> ElemType {
        ElemType::UInt(UIntKind::U32)
    }
}

impl CubeKernel for Shader {
    fn define(&self) -> KernelDefinition {
        // Only the source is compiled.
        let settings = KernelSettings::new(Dim3::new_single(), ExecutionMode::Unchecked, AddressType::U32);
        KernelDefinition { body: Scope::root(settings.clone()), settings, info: Info::default() }
    }

    fn source(&self) -> Option<PrecompiledSource> {
        Some(PrecompiledSource { source: self.wgsl(), entrypoint_name: self.entry.into(), lang: "wgsl" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every number once, those of the arguments in their order, and no buffer that is only read.
    #[test]
    fn shaders_bind_what_cubecl_gives_them() {
        let shader = Shader {
            module: Module::Prepare,
            entry: "positives",
            variant: Variant::default(),
            numbers: vec![0, 2, 3, 6, 7],
        };
        let source = shader.wgsl();
        let bound: Vec<(&str, &str)> = source
            .lines()
            .filter_map(|line| line.strip_prefix("@group(0) @binding("))
            .filter_map(|line| line.split_once(") "))
            .collect();
        let number = |name: &str| bound.iter().find(|(_, rest)| rest.contains(&format!("> {name}:"))).unwrap().0;
        assert_eq!(["side", "state", "query", "passage", "params"].map(number), ["0", "1", "2", "3", "4"]);
        let mut numbers: Vec<_> = bound.iter().map(|(number, _)| *number).collect();
        numbers.sort();
        numbers.dedup();
        assert_eq!(numbers.len(), 8, "{source}");
        assert!(!source.contains("var<storage, read>") && source.contains("var<uniform> params"));
    }
}
