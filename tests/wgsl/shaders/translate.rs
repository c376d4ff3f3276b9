//! WGSL through naga, which is what wgpu compiles with: parsed, validated, reflected, and translated to what drivers take.

use naga::back::{glsl, hlsl, msl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, GlobalVariable, Handle, ShaderStage, StorageAccess};
use samtone::DType;
use samtone::wgpu::{Module, Products, Variant};

/// A module of one variant, parsed and validated.
pub struct Shader {
    pub module: Module,
    pub variant: Variant,
    pub ir: naga::Module,
    pub info: ModuleInfo,
}

/// Every variant that some device gets: all combinations of what devices have.
pub fn variants() -> Vec<Variant> {
    let mut variants = Vec::new();
    for products in [Products::Fma, Products::Cooperative, Products::Emulated] {
        for bits in 0..8 {
            let device = samtone::wgpu::Capabilities {
                f16: bits & 1 != 0,
                workgroup_bytes: 16 << (10 + (bits >> 1 & 1)),
                subgroups: bits & 4 != 0,
                products,
                ..samtone::wgpu::Capabilities::default()
            };
            let variant = device.variant(DType::F16);
            if !variants.contains(&variant) {
                variants.push(variant);
            }
        }
    }
    variants
}

/// What a module of a variant may ask of a device.
pub fn needed(module: Module, variant: Variant) -> Capabilities {
    let tiles = [Module::LogSumExp, Module::GradientTile, Module::LogSumExpPrefixes, Module::GradientTilePrefixes];
    let multiplies = module == Module::GradientProduct || tiles.contains(&module);
    let mut needed = Capabilities::empty();
    needed.set(Capabilities::SHADER_FLOAT16, variant.f16 && !matches!(module, Module::Combine | Module::Prefixes));
    let exchanges = match module {
        Module::Prefixes => false,
        _ if multiplies => variant.products != Products::Fma,
        _ => variant.subgroups,
    };
    needed.set(Capabilities::SUBGROUP, exchanges);
    needed.set(Capabilities::COOPERATIVE_MATRIX, multiplies && variant.products == Products::Cooperative);
    needed
}

impl Shader {
    /// Validated under these capabilities and no more.
    pub fn new(module: Module, variant: Variant, capabilities: Capabilities) -> Result<Self, String> {
        let source = module.source(variant, false);
        let said = |message: String| format!("{} for {variant}: {message}", module.name());
        let ir = naga::front::wgsl::parse_str(&source).map_err(|e| said(e.emit_to_string(&source)))?;
        let info = Validator::new(ValidationFlags::all(), capabilities).validate(&ir);
        let info = info.map_err(|e| said(e.emit_to_string(&source)))?;
        Ok(Self { module, variant, ir, info })
    }

    /// Every module of every variant.
    pub fn all() -> Result<Vec<Self>, String> {
        let all = variants().into_iter().flat_map(|variant| Module::ALL.map(|module| (module, variant)));
        all.map(|(module, variant)| Self::new(module, variant, needed(module, variant))).collect()
    }

    /// Whether it has cooperative matrices, which are an extension of wgpu for Vulkan and Metal.
    pub fn is_cooperative(&self) -> bool {
        needed(self.module, self.variant).contains(Capabilities::COOPERATIVE_MATRIX)
    }

    pub fn name(&self) -> String {
        format!("{} for {}", self.module.name(), self.variant)
    }

    /// Entry points by name, with the variables that each uses, itself or through the functions it calls.
    pub fn entries(&self) -> impl Iterator<Item = (&naga::EntryPoint, Vec<&GlobalVariable>)> {
        self.ir.entry_points.iter().enumerate().map(|(k, entry)| {
            let uses = self.info.get_entry_point(k);
            let used = self.ir.global_variables.iter().filter(|(handle, _)| !uses[*handle].is_empty());
            (entry, used.map(|(_, variable)| variable).collect())
        })
    }

    /// Bytes of a type.
    pub fn size(&self, ty: Handle<naga::Type>) -> u32 {
        self.ir.types[ty].inner.size(self.ir.to_ctx())
    }

    pub fn spirv(&self) -> Result<Vec<u32>, String> {
        // As wgpu asks for devices of Vulkan 1.1.
        let options = spv::Options { lang_version: (1, 3), ..spv::Options::default() };
        spv::write_vec(&self.ir, &self.info, &options, None).map_err(|e| format!("{}: {e}", self.name()))
    }

    pub fn msl(&self) -> Result<String, String> {
        let options = msl::Options { lang_version: (2, 3), fake_missing_bindings: true, ..msl::Options::default() };
        let pipeline = msl::PipelineOptions::default();
        let written = msl::write_string(&self.ir, &self.info, &options, &pipeline);
        Ok(written.map_err(|e| format!("{}: {e}", self.name()))?.0)
    }

    pub fn hlsl(&self) -> Result<String, String> {
        let shader_model = if self.variant.f16 { hlsl::ShaderModel::V6_2 } else { hlsl::ShaderModel::V6_0 };
        let options = hlsl::Options { shader_model, fake_missing_bindings: true, ..hlsl::Options::default() };
        let (mut text, pipeline) = (String::new(), hlsl::PipelineOptions::default());
        let mut writer = hlsl::Writer::new(&mut text, &options, &pipeline);
        let written = writer.write(&self.ir, &self.info, None).map(drop);
        written.map_err(|e| format!("{}: {e}", self.name()))?;
        Ok(text)
    }

    /// GLSL ES 3.10 of one entry point.
    pub fn glsl(&self, entry: &str) -> Result<String, String> {
        let options = glsl::Options { version: glsl::Version::new_gles(310), ..glsl::Options::default() };
        let pipeline =
            glsl::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: entry.into(), multiview: None };
        let checks = BoundsCheckPolicies { index: BoundsCheckPolicy::Restrict, ..BoundsCheckPolicies::default() };
        let mut text = String::new();
        let written = glsl::Writer::new(&mut text, &self.ir, &self.info, &options, &pipeline, checks)
            .and_then(|mut writer| writer.write().map(drop));
        written.map_err(|e| format!("{}, {entry}: {e}", self.name()))?;
        Ok(text)
    }
}

/// Whether a variable is a storage buffer, and if so, whether it is written.
pub fn storage(variable: &GlobalVariable) -> Option<bool> {
    match variable.space {
        AddressSpace::Storage { access } => Some(access.contains(StorageAccess::STORE)),
        _ => None,
    }
}
