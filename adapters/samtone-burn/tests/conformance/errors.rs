//! What is refused, and in which words.

use crate::Outcome;
use crate::support::{matrix, numbers};
use crate::tensors::wave;
use burn::tensor::{DType, Device, Tensor};
use samtone_burn::samtone::Temperature::Fixed;
use samtone_burn::{Block, Call, Group, Loss, NoNegative, SamToNe, Temperature, ZeroNorm};

const TAU: f64 = 0.1;

pub fn sentences(device: &Device) -> Outcome {
    let samtone = SamToNe::new(Call::new(Loss::samtone_query(), TAU));
    let (q, p) = (wave(6, 5, 0.7, device), wave(9, 5, 0.9, device));
    let (query, passage) = (|| q.clone(), || p.clone());
    let number = |x: f32| Tensor::<1>::from_floats([x], device);
    let mut refused = vec![
        (samtone.forward(passage(), query(), Fixed), "argument `passage` is 6 rows; allowed: at least as many"),
        (samtone.forward(query(), wave(9, 4, 0.9, device), Fixed), "argument `passage` is embeddings of dimension 4"),
        (
            samtone.with(|call| call.with_temperature(0.0)).forward(query(), passage(), Fixed),
            "argument `temperature` is 0; allowed: a number from 1e-6 to 1e6",
        ),
        (samtone.forward(query(), passage(), Temperature::Tau(number(-1.0))), "argument `temperature` is -1"),
        (
            samtone.forward(query(), passage(), Temperature::LogBeta(number(f32::INFINITY))),
            "argument `log_beta` is inf",
        ),
        (
            samtone.forward(query(), passage(), Temperature::Tau(Tensor::from_floats([1.0, 2.0], device))),
            "argument `temperature` is a tensor of shape [2] and type f32; allowed: one number",
        ),
        (
            samtone.with(|call| call.with_passage_ids([1])).forward(query(), passage(), Fixed),
            "argument `passage_ids` is a slice of 1",
        ),
        (
            samtone.with(|call| call.with_shared_ids(true).with_passage_ids([1; 9])).forward(query(), passage(), Fixed),
            "argument `shared_ids` is true without query ids; allowed: false, or query ids and passage ids",
        ),
        (
            samtone.with(|call| call.with_positives([9; 6])).forward(query(), passage(), Fixed),
            "argument `positives` is 9 at row 0",
        ),
        (
            samtone.with(|call| call.with_margin(f64::NAN)).forward(query(), passage(), Fixed),
            "argument `margin` is NaN",
        ),
        (
            samtone.with(|call| call.with_workspace_bytes(1)).forward(query(), passage(), Fixed),
            "option `workspace_bytes` is 1",
        ),
        (
            samtone.with(|call| call.with_prefixes([4, 2])).forward(query(), passage(), Fixed),
            "argument `prefixes` is 2 at position 1; allowed: ascending numbers",
        ),
        (
            samtone.with(|call| call.with_prefixes([2, 6])).forward(query(), passage(), Fixed),
            "argument `prefixes` is 6 at position 1; allowed: at most 5",
        ),
        (
            samtone.with(|call| call.with_prefixes([2, 4]).with_prefix_weights([1.0])).forward(
                query(),
                passage(),
                Fixed,
            ),
            "argument `prefix_weights` is a slice of 1 elements; allowed: 2, one for each prefix",
        ),
    ];
    for (share, sentence) in [
        (0.0, "argument `tile_skipping` is 0; allowed: a number above 0 and below 1"),
        (1.0, "argument `tile_skipping` is 1; allowed: a number above 0 and below 1"),
        (-1.0, "argument `tile_skipping` is -1"),
        (f64::NAN, "argument `tile_skipping` is NaN"),
    ] {
        refused
            .push((samtone.with(|call| call.with_tile_skipping(share)).forward(query(), passage(), Fixed), sentence));
    }
    if device.supports_dtype(DType::F16) {
        let half = p.clone().cast(DType::F16);
        refused
            .push((samtone.forward(query(), half, Fixed), "argument `passage` is of type f16; allowed: the type of"));
    }
    if device.supports_dtype(DType::F64) {
        let double = p.clone().cast(DType::F64);
        refused
            .push((samtone.forward(query(), double, Fixed), "argument `passage` is of type f64; allowed: f32, f16 or"));
    }
    if *device != Device::flex() {
        let elsewhere = wave(9, 5, 0.9, &Device::flex());
        refused.push((samtone.forward(query(), elsewhere, Fixed), "argument `passage` is on Flex"));
        let number = Tensor::<1>::from_floats([1.0], &Device::flex());
        let result = samtone.forward(query(), passage(), Temperature::Tau(number));
        refused.push((result, "argument `temperature` is on Flex"));
    }
    let (balanced, plain) = (device.clone().autodiff().gradient_checkpointing(), device.clone().autodiff());
    refused.push((
        samtone.forward(wave(6, 5, 0.7, &plain), wave(9, 5, 0.9, &balanced), Fixed),
        "argument `passage` is a tensor with gradient checkpointing",
    ));
    for (result, sentence) in refused {
        match result {
            Err(error) if error.to_string().starts_with(sentence) => {}
            Err(error) => return Err(format!("`{error}` instead of `{sentence}`").into()),
            Ok(_) => return Err(format!("nothing instead of `{sentence}`").into()),
        }
    }
    Ok(())
}

/// Rows that are wrong, found by whoever looks first: `forward` on the CPU, the report on a device.
pub fn rows(device: &Device) -> Outcome {
    let lonely = Loss::custom("lonely", vec![Group::new(1.0, &[Block::QP], 0)?])?;
    let (q, p) = (wave(6, 5, 0.7, device), wave(9, 5, 0.9, device));
    let with = |row: usize, value: f64| {
        let mut values = numbers(q.clone());
        values[row * 5..row * 5 + 5].fill(0.0);
        values[row * 5 + 2] = value;
        matrix(&values, 5, device, DType::F32)
    };
    let samtone = SamToNe::new(Call::new(Loss::samtone_query(), TAU));
    let prefixes = samtone.with(|call| call.with_prefixes([2, 5]));
    let lonely = samtone.with(|call| call.with_loss(lonely).with_query_ids([7; 6]).with_passage_ids([7; 9]));
    for (samtone, q, sentence) in [
        (samtone.clone(), with(3, 0.0), "the query embedding in row 3 has norm zero"),
        (samtone.clone(), with(4, f64::NAN), "the query embedding in row 4 contains NaN at column 2"),
        (samtone.clone(), with(5, f64::INFINITY), "the query embedding in row 5 contains inf at column 2"),
        (lonely.clone(), q.clone(), "row 0 has no negative left in group 0"),
        (prefixes, with(2, 1.0), "the query embedding in row 2 has norm zero in its first 2 entries"),
    ] {
        let found = samtone.forward_with_metrics(q, p.clone(), Fixed);
        match found.and_then(|(loss, report)| {
            assert!(numbers(loss)[0].is_nan(), "a loss that is refused later is no number until then");
            report.evaluation()
        }) {
            Err(error) if error.to_string().starts_with(sentence) => {}
            other => return Err(format!("{other:?} instead of `{sentence}`").into()),
        }
    }
    let loss =
        samtone.with(|call| call.with_zero_norm(ZeroNorm::ZeroGradient)).forward(with(3, 0.0), p.clone(), Fixed)?;
    assert!(numbers(loss)[0].is_finite());
    let lonely = lonely.with(|call| call.with_no_negative(NoNegative::Zero));
    assert_eq!(numbers(lonely.forward(q, p, Fixed)?)[0], 0.0);
    Ok(())
}
