//! Turns a plan's launches into bytes that the driver copies: checks the pointers and fills them in. It needs no driver.

use crate::cuda::{Address, Array, Launch, Plan, Slot};
use crate::error::{Error, Result};
use std::ffi::c_void;

/// A CUDA stream: its `CUstream` (or `cudaStream_t`) as a number. PyTorch calls that number `stream.cuda_stream`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stream(u64);

impl Stream {
    /// The default stream. It waits for all other streams, and they for it, unless they are made not to, as the streams of cudarc and of
    /// PyTorch are. It cannot be captured into a graph.
    pub const LEGACY: Self = Self(0);
    /// The default stream of the calling thread. In another thread the same number means another stream, and nothing orders the two.
    pub const PER_THREAD: Self = Self(2);

    /// A stream of the device's primary context. The number is not checked before the driver uses it.
    pub const fn from_raw(stream: u64) -> Self {
        Self(stream)
    }

    /// The number it was made from.
    pub const fn as_raw(self) -> u64 {
        self.0
    }

    /// The stream as the driver takes it.
    pub(super) fn handle(self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0 as usize)
    }
}

/// Where each [`Slot`] is: device addresses (`CUdeviceptr`) as numbers. A slot that the call does not use may be 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Pointers {
    /// q, M × d.
    pub query: u64,
    /// p, N × d.
    pub passage: u64,
    /// A copy of [`Plan::side_data`].
    pub side: u64,
    /// It must stay unchanged from a forward call to its backward call, and until the results are read.
    pub state: u64,
    /// Memory that calls work in.
    pub workspace: u64,
    /// ∂L/∂q, the shard's rows × d.
    pub query_gradient: u64,
    /// ∂L/∂p, N × d.
    pub passage_gradient: u64,
    /// The upstream gradient, one f32.
    pub upstream: u64,
}

impl Pointers {
    /// The address of a slot.
    pub const fn get(&self, slot: Slot) -> u64 {
        match slot {
            Slot::Query => self.query,
            Slot::Passage => self.passage,
            Slot::Side => self.side,
            Slot::State => self.state,
            Slot::Workspace => self.workspace,
            Slot::QueryGradient => self.query_gradient,
            Slot::PassageGradient => self.passage_gradient,
            Slot::Upstream => self.upstream,
        }
    }

    /// Gives a slot its address.
    pub const fn set(&mut self, slot: Slot, address: u64) {
        *match slot {
            Slot::Query => &mut self.query,
            Slot::Passage => &mut self.passage,
            Slot::Side => &mut self.side,
            Slot::State => &mut self.state,
            Slot::Workspace => &mut self.workspace,
            Slot::QueryGradient => &mut self.query_gradient,
            Slot::PassageGradient => &mut self.passage_gradient,
            Slot::Upstream => &mut self.upstream,
        } = address;
    }

    /// An error unless every slot that these launches of `plan` use has a well-aligned address.
    pub(super) fn check<'l>(&self, plan: &Plan, launches: impl IntoIterator<Item = &'l Launch> + Clone) -> Result<()> {
        let used = |slot: Slot| {
            let addresses = launches.clone().into_iter().flat_map(|l| &l.arguments).flat_map(|a| &a.pointers);
            addresses
                .into_iter()
                .any(|(_, address)| matches!(address, Address::In(id, _) if plan.arrays()[id.0].slot == slot))
        };
        Slot::ALL.into_iter().filter(|slot| used(*slot)).try_for_each(|slot| self.check_slot(plan, slot))
    }

    /// An error unless the slot has a well-aligned address.
    pub(super) fn check_slot(&self, plan: &Plan, slot: Slot) -> Result<()> {
        let (address, alignment) = (self.get(slot), plan.slot_alignment(slot));
        if address == 0 {
            let allowed = format!("device memory of at least {} bytes", plan.slot_bytes(slot));
            return Err(Error::invalid(slot.name(), "a null pointer", allowed));
        }
        if address % alignment != 0 {
            return Err(Error::Misaligned { slot: slot.name(), address, alignment });
        }
        Ok(())
    }
}

/// An error unless memory of `bytes` holds what `plan` puts into `slot`.
///
/// # Errors
/// [`Error::InvalidArgument`], with the number of bytes that is needed.
pub fn check_slot_bytes(plan: &Plan, slot: Slot, bytes: u64) -> Result<()> {
    let needed = plan.slot_bytes(slot);
    if bytes < needed {
        return Err(Error::invalid(slot.name(), format!("{bytes} bytes"), format!("{needed} bytes or more")));
    }
    Ok(())
}

/// The parameters of a launch. The next launch uses the same memory again.
#[derive(Default)]
pub(super) struct Parameters {
    /// The bytes of all parameters. Each begins at a multiple of 8 bytes, which is the largest alignment of any parameter.
    words: Vec<u64>,
    starts: Vec<usize>,
    pointers: Vec<*mut c_void>,
}

impl Parameters {
    /// Fills in the addresses of a launch. Gives a pointer to each of its parameters in order. They are valid until the next call.
    pub(super) fn fill(&mut self, launch: &Launch, arrays: &[Array], slots: &Pointers) -> &mut [*mut c_void] {
        self.words.clear();
        self.starts.clear();
        for argument in &launch.arguments {
            self.starts.push(self.words.len());
            self.words.resize(self.words.len() + argument.bytes.len().div_ceil(8), 0);
        }
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.words);
        for (argument, start) in launch.arguments.iter().zip(&self.starts) {
            let own = &mut bytes[8 * start..8 * start + argument.bytes.len()];
            own.copy_from_slice(&argument.bytes);
            for (at, address) in &argument.pointers {
                own[*at..*at + 8].copy_from_slice(&resolve(*address, arrays, slots).to_le_bytes());
            }
        }
        let base = self.words.as_mut_ptr();
        self.pointers.clear();
        // No parameter is empty, because C has none. So each start is inside `words`.
        self.pointers.extend(self.starts.iter().map(|&start| base.wrapping_add(start).cast::<c_void>()));
        &mut self.pointers
    }
}

/// An address on the device. It may lie before its array, because kernels add an offset before they use it.
fn resolve(address: Address, arrays: &[Array], slots: &Pointers) -> u64 {
    match address {
        Address::Null => 0,
        Address::In(id, offset) => {
            let array = &arrays[id.0];
            slots.get(array.slot).wrapping_add(array.offset).wrapping_add_signed(offset)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{Argument, ArrayId, Problem};
    use crate::{Call, DType, Loss};

    fn plan() -> Plan {
        let call = Call::new(Loss::samtone_both(), 0.1);
        Plan::new(&Problem::new(call.pairs(3, 4).unwrap(), DType::F32, 8).unwrap()).unwrap()
    }

    fn pointers() -> Pointers {
        let at = |n: u64| n << 20;
        Pointers {
            query: at(1),
            passage: at(2),
            side: at(3),
            state: at(4),
            workspace: at(5),
            query_gradient: at(6),
            passage_gradient: at(7),
            upstream: at(8),
        }
    }

    #[test]
    fn addresses_are_slot_plus_array_plus_offset() {
        let arrays = [
            Array { name: "a", slot: Slot::State, offset: 256, bytes: 64 },
            Array { name: "b", slot: Slot::QueryGradient, offset: 0, bytes: 64 },
        ];
        let argument = |bytes: Vec<u8>, pointers| {
            let mut argument = Argument::default();
            (argument.bytes, argument.pointers) = (bytes, pointers);
            argument
        };
        let launch = Launch {
            kernel: "k".into(),
            module: "m",
            grid: [1, 1],
            threads: 32,
            shared_bytes: 0,
            arguments: vec![
                argument(vec![1, 2, 3, 4], vec![]),
                argument(
                    vec![0xee; 28],
                    vec![
                        (4, Address::In(ArrayId(0), 8)),
                        (12, Address::Null),
                        (20, Address::In(ArrayId(1), -0x60_0010)),
                    ],
                ),
            ],
        };
        let mut parameters = Parameters::default();
        for _ in 0..2 {
            let filled = parameters.fill(&launch, &arrays, &pointers());
            assert_eq!(filled.len(), 2);
            assert!(filled.iter().all(|p| p.addr() % 8 == 0));
            // SAFETY: the parameters have these lengths, and live until the next call of `fill`.
            let (first, second) = unsafe {
                let bytes = |k: usize, length| std::slice::from_raw_parts(filled[k].cast::<u8>(), length);
                (bytes(0, 4), bytes(1, 28))
            };
            assert_eq!(first, [1, 2, 3, 4]);
            let word = |at: usize| u64::from_le_bytes(second[at..at + 8].try_into().unwrap());
            assert_eq!(second[..4], [0xee; 4]);
            assert_eq!([word(4), word(12), word(20)], [(4 << 20) + 256 + 8, 0, (6_u64 << 20).wrapping_sub(0x60_0010)]);
        }
    }

    #[test]
    fn what_a_call_does_not_use_may_be_null() {
        let plan = plan();
        let forward = Pointers { query_gradient: 0, passage_gradient: 0, upstream: 0, ..pointers() };
        assert_eq!(forward.check(&plan, plan.forward()), Ok(()));
        let error = forward.check(&plan, plan.backward()).unwrap_err().to_string();
        assert!(error.contains("query_gradient") && error.contains("null") && error.contains("96 bytes"), "{error}");
        assert_eq!(Pointers { upstream: 0, ..pointers() }.check(&plan, plan.backward()), Ok(()));
        for slot in [Slot::Query, Slot::Passage, Slot::Side, Slot::State, Slot::Workspace] {
            let mut some = pointers();
            match slot {
                Slot::Query => some.query = 0,
                Slot::Passage => some.passage = 0,
                Slot::Side => some.side = 0,
                Slot::State => some.state = 0,
                _ => some.workspace = 0,
            }
            let error = some.check(&plan, plan.forward()).unwrap_err().to_string();
            assert!(error.contains(&format!("`{}`", slot.name())), "{error}");
        }
    }

    #[test]
    fn a_misaligned_pointer_is_named() {
        let plan = plan();
        let error = Pointers { workspace: (5 << 20) + 16, ..pointers() }.check(&plan, plan.forward()).unwrap_err();
        assert_eq!(error, Error::Misaligned { slot: "workspace", address: (5 << 20) + 16, alignment: 256 });
        assert_eq!(Pointers { query: (1 << 20) + 4, ..pointers() }.check(&plan, plan.forward()), Ok(()));
        assert!(Pointers { query: (1 << 20) + 2, ..pointers() }.check(&plan, plan.forward()).is_err());
    }

    #[test]
    fn short_memory_is_refused_with_what_is_needed() {
        let plan = plan();
        let needed = plan.slot_bytes(Slot::State);
        assert_eq!(check_slot_bytes(&plan, Slot::State, needed), Ok(()));
        let error = check_slot_bytes(&plan, Slot::State, needed - 1).unwrap_err().to_string();
        assert!(error.contains("`state`") && error.contains(&format!("{needed} bytes or more")), "{error}");
    }
}
