//! The backward step: gradients that are there since the loss was computed, times the upstream gradient.

use crate::backend::{Inputs, Outputs, SamToNeBackend, Wanted};
use crate::{Result, SamToNe};
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, BackendTypes, DType, Shape, TensorMetadata};

/// A tensor of `Autodiff<B>`.
type AutodiffTensor<B> = <Autodiff<B> as BackendTypes>::FloatTensorPrimitive;

impl<B: SamToNeBackend, C: CheckpointStrategy> SamToNeBackend for Autodiff<B, C> {
    fn samtone(samtone: &SamToNe, inputs: Inputs<Self>, wanted: Wanted) -> Result<Outputs<Self>> {
        let Inputs { query, passage, temperature } = inputs;
        let tracked = Wanted {
            query: query.is_tracked(),
            passage: passage.is_tracked(),
            temperature: temperature.tensor().is_some_and(|tensor| tensor.is_tracked()),
        };
        let of_temperature = temperature.tensor().cloned();
        let inner = Inputs {
            query: query.primitive().clone(),
            passage: passage.primitive().clone(),
            temperature: temperature.try_map(|tensor| Result::Ok(tensor.into_primitive()))?,
        };
        let wanted_or_tracked = Wanted {
            query: wanted.query || tracked.query,
            passage: wanted.passage || tracked.passage,
            temperature: wanted.temperature || tracked.temperature,
        };
        // Together with the loss, because a later call would have to compute every cosine again.
        let computed = B::samtone(samtone, inner, wanted_or_tracked)?;
        let [dq, dp, dt] = computed.gradients;
        let kept = |gradient: &Option<FloatTensor<B>>, of: &AutodiffTensor<B>| Kept {
            gradient: gradient.clone(),
            dtype: of.dtype(),
            shape: of.shape(),
        };
        let (of_q, of_p) = (kept(&dq, &query), kept(&dp, &passage));
        let loss = match of_temperature {
            None => record::<B, C, 2>([query, passage], [of_q, of_p], computed.loss),
            Some(tensor) => {
                let of_t = kept(&dt, &tensor);
                record::<B, C, 3>([query, passage, tensor], [of_q, of_p, of_t], computed.loss)
            }
        };
        let asked = |wanted: bool, gradient: Option<FloatTensor<B>>| {
            if wanted { gradient.map(<Self as AutodiffBackend>::from_inner) } else { None }
        };
        let gradients = [asked(wanted.query, dq), asked(wanted.passage, dp), asked(wanted.temperature, dt)];
        Ok(Outputs { loss, gradients, report: computed.report })
    }
}

/// What is kept of an input: its gradient, f32 also for 16-bit embeddings, since the upstream gradient, often a factor that keeps
/// f16 from underflow, comes with the backward call and must act before the rounding.
#[derive(Debug, Clone)]
struct Kept<B: Backend> {
    gradient: Option<FloatTensor<B>>,
    dtype: DType,
    shape: Shape,
}

#[derive(Debug)]
struct SamToNeStep;

fn record<B: Backend, C: CheckpointStrategy, const N: usize>(
    inputs: [AutodiffTensor<B>; N],
    kept: [Kept<B>; N],
    loss: FloatTensor<B>,
) -> AutodiffTensor<B> {
    let nodes = inputs.map(|input| input.into_parts().1);
    match Backward::<B, N>::prepare::<C>(SamToNeStep, nodes).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(kept, loss),
        OpsKind::UnTracked(prepared) => prepared.finish(loss),
    }
}

impl<B: Backend, const N: usize> Backward<B, N> for SamToNeStep {
    type State = [Kept<B>; N];

    fn backward(self, ops: Ops<Self::State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let upstream = gradients.consume::<B>(&ops.node);
        for (parent, Kept { gradient, dtype, shape }) in ops.parents.into_iter().zip(ops.state) {
            let (Some(parent), Some(gradient)) = (parent, gradient) else { continue };
            let ones = Shape::from(vec![1; gradient.shape().num_dims()]);
            let factor = B::float_reshape(upstream.clone(), ones);
            let scaled = B::float_reshape(B::float_mul(gradient, factor), shape);
            let scaled = if dtype == DType::F32 { scaled } else { B::float_cast(scaled, dtype.into()) };
            gradients.register::<B>(parent.id, scaled);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Call, Loss, Temperature};
    use burn::backend::flex::FlexTensor;
    use burn::backend::{Flex, TensorData};

    type Tracking = Autodiff<Flex>;

    fn numbers(tensor: FlexTensor) -> Vec<f32> {
        tensor.into_data().try_to_vec().unwrap()
    }

    /// What is wanted comes as constants, beside what autodiff tracks, which it gets.
    #[test]
    fn gradients_that_are_wanted_are_those_that_backward_gives() {
        let tensor = |frequency: f32| {
            let values: Vec<f32> = (0..12).map(|i| (i as f32 * frequency).sin() + 0.2).collect();
            Tracking::from_inner(FlexTensor::from_data(TensorData::new(values, [4, 3])))
        };
        let (query, passage) = (tensor(0.7).require_grad(), tensor(0.9));
        let inputs = Inputs::<Tracking> { query: query.clone(), passage, temperature: Temperature::Fixed };
        let wanted = Wanted { query: true, passage: true, temperature: false };
        let samtone = SamToNe::new(Call::new(Loss::samtone_both(), 0.5));
        let outputs = Tracking::samtone(&samtone, inputs, wanted).unwrap();
        let [dq, dp, dt] = outputs.gradients;
        let (dq, dp) = (dq.unwrap(), dp.unwrap());
        assert!(dt.is_none() && !dq.is_tracked() && !dp.is_tracked());
        assert!(numbers(dp.into_primitive()).iter().any(|x| *x != 0.0));
        let gradients = outputs.loss.backward();
        assert_eq!(numbers(query.grad(&gradients).unwrap()), numbers(dq.into_primitive()));
    }
}
