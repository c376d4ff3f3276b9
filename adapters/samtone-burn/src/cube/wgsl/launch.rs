//! A plan's slots as buffers of cubecl, and its dispatches as launches.

use super::shader::Shader;
use crate::{Error, Result};
use burn::cubecl::prelude::{Client, CubeCount};
use burn::cubecl::server::{Handle, KernelArguments, MetadataBindingInfo};
use samtone::wgpu::{Binding, Dispatch, Plan, Slot};

/// What the slots of a plan are.
pub(super) struct Buffers([Option<Handle>; Slot::ALL.len()]);

impl Buffers {
    /// The plan's own slots. Parameters are none of them: they go with each launch.
    pub(super) fn new(client: &Client, plan: &Plan) -> Self {
        Self(Slot::ALL.map(|slot| match (slot, plan.slot_bytes(slot)) {
            (_, 0) | (Slot::Uniforms, _) => None,
            (slot, _) if slot.is_callers() => None,
            (Slot::Side, _) => Some(client.create_from_slice(plan.side_data())),
            (Slot::State, bytes) => Some(client.empty(bytes.max(plan.state_bytes()) as usize)),
            (_, bytes) => Some(client.empty(bytes as usize)),
        }))
    }

    pub(super) fn set(&mut self, slot: Slot, handle: Handle) {
        self.0[slot as usize] = Some(handle);
    }

    pub(super) fn get(&self, slot: Slot) -> Result<&Handle> {
        let missing = || Error::Wgpu { call: "launch", reason: format!("the plan has no buffer `{}`", slot.name()) };
        self.0[slot as usize].as_ref().ok_or_else(missing)
    }

    pub(super) fn launch<'d>(
        &self,
        client: &Client,
        plan: &Plan,
        dispatches: impl IntoIterator<Item = &'d Dispatch>,
    ) -> Result<()> {
        for dispatch in dispatches {
            let mut arguments = KernelArguments::new();
            for binding in &dispatch.bindings {
                if binding.slot == Slot::Uniforms {
                    arguments.info = MetadataBindingInfo::custom(words(plan, binding));
                } else {
                    let handle = self.get(binding.slot)?.clone();
                    let beyond = handle.size_in_used().saturating_sub(binding.offset + binding.bytes);
                    arguments = arguments.with_buffer(handle.offset_start(binding.offset).offset_end(beyond).binding());
                }
            }
            let [x, y] = dispatch.workgroups;
            client.launch(Box::new(Shader::of(dispatch, plan.variant())), CubeCount::Static(x, y, 1), arguments);
        }
        Ok(())
    }
}

/// The parameters of a dispatch.
fn words(plan: &Plan, binding: &Binding) -> Vec<u64> {
    let bytes = plan.uniforms().get(binding.offset as usize..).unwrap_or_default();
    let bytes = bytes.get(..binding.bytes as usize).unwrap_or(bytes);
    bytes.chunks_exact(8).map(bytemuck::pod_read_unaligned).collect()
}
