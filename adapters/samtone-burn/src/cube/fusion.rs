//! The same with fusion: what fusion has queued for the tensors of a call runs first, and the call's outputs are tensors that
//! fusion may fuse with what comes behind.

use crate::backend::{Inputs, Outputs, SamToNeBackend, Wanted};
use crate::{Result, SamToNe};
use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn_fusion::client::GlobalFusionClient;
use burn_fusion::stream::StreamId;
use burn_fusion::{Fusion, FusionBackend, NoOp};
use burn_ir::{InitOperationIr, OperationIr, OperationOutput};

impl<B: FusionBackend + SamToNeBackend> SamToNeBackend for Fusion<B> {
    fn samtone(samtone: &SamToNe, inputs: Inputs<Self>, wanted: Wanted) -> Result<Outputs<Self>> {
        let client = inputs.query.client.clone();
        let resolve = |tensor: FloatTensor<Self>| {
            let client = tensor.client.clone();
            client.resolve_tensor_float::<B>(tensor)
        };
        let resolved = Inputs::<B> {
            query: resolve(inputs.query),
            passage: resolve(inputs.passage),
            temperature: inputs.temperature.try_map(|tensor| Result::Ok(resolve(tensor)))?,
        };
        let computed = B::samtone(samtone, resolved, wanted)?;
        Ok(Outputs {
            loss: registered::<B>(&client, computed.loss),
            gradients: computed.gradients.map(|gradient| gradient.map(|tensor| registered::<B>(&client, tensor))),
            report: computed.report,
        })
    }
}

fn registered<B: FusionBackend>(
    client: &GlobalFusionClient<B::FusionRuntime>,
    tensor: FloatTensor<B>,
) -> FloatTensor<Fusion<B>> {
    let (shape, dtype) = (tensor.shape(), tensor.dtype());
    let handle = B::float_tensor_handle(tensor);
    let operation = InitOperationIr::create(shape, dtype, || client.register_tensor_handle(handle));
    client.register(StreamId::current(), OperationIr::Init(operation), NoOp::<B>::new()).output()
}
