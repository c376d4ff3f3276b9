//! Through candle's autograd against the reference in f64.

use candle_core::{DType, Device, Result, Tensor, Var};
use samtone_candle::samtone::Temperature::Fixed;
use samtone_candle::samtone::{self, Batch, Embeddings, reference};
use samtone_candle::{Call, Loss, NoNegative, SamToNe, Scope, Temperature, ZeroNorm};

const ROWS: usize = 6;
const PASSAGES: usize = 9;
const DIM: usize = 5;
const TAU: f64 = 0.1;

fn wave(rows: usize, dim: usize, frequency: f32) -> Tensor {
    let values: Vec<f32> = (0..rows * dim).map(|i| (i as f32 * frequency + 0.3).sin() + 0.1).collect();
    Tensor::from_vec(values, (rows, dim), &Device::Cpu).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let (off, size) = (norm(&mut got.iter().zip(want).map(|(g, w)| g - w)), norm(&mut want.iter().copied()));
    assert!(off <= tolerance * size + 1e-7, "{what}: off by {off:e} of {size:e}");
}

fn call(loss: Loss) -> Call {
    Call::new(loss, TAU)
}

fn op(loss: Loss) -> SamToNe {
    SamToNe::new(call(loss))
}

/// What the reference gives for these embeddings, ROWS × DIM and PASSAGES × DIM.
fn by_reference(call: &Call, q: &Tensor, p: &Tensor, upstream: f64) -> samtone::Result<reference::ReferenceOutput> {
    let (qs, ps) = (numbers(q), numbers(p));
    let batch = Batch::new(call, Embeddings::new(&qs, ROWS, DIM)?, Embeddings::new(&ps, PASSAGES, DIM)?)?;
    reference::loss_and_gradients(&batch, upstream)
}

/// Every preset and type, all masks, an upstream factor, a tensor for either form of the temperature.
#[test]
fn gradients_are_those_of_the_reference() -> Result<()> {
    let (query_ids, passage_ids) = ([1, 2, 1, 4, 5, 6], [1, 2, 3, 4, 2, 6, 7, 8, 9]);
    let (positives, owners) = ([0, 1, 2, 3, 4, 4], [-1, -1, -1, -1, -1, -1, 0, 3, -1]);
    let weights = [1.0, 0.5, 2.0, 0.0, 1.0, 1.0];
    let mut compared = [0; 2]; // without masks, with them
    for (name, ..) in Loss::PRESETS {
        for (dtype, tolerance) in [(DType::F32, 3e-5), (DType::F16, 2e-3), (DType::BF16, 1e-2)] {
            for masked in [false, true] {
                // Without masks there is no margin either, also where the preset has one.
                let mut call = call(Loss::by_name(name).unwrap()).with_margin(f64::INFINITY);
                let q = Var::from_tensor(&wave(ROWS, DIM, 0.7).to_dtype(dtype)?)?;
                let p = Var::from_tensor(&wave(PASSAGES, DIM, 0.9).to_dtype(dtype)?)?;
                if masked {
                    call = call.with_query_ids(query_ids).with_passage_ids(passage_ids).with_shared_ids(true);
                    call = call.with_positives(positives).with_weights(weights);
                    call = call.with_hard_negative_owners(owners, Scope::Own).with_margin(0.4);
                    call = call.with_workspace_bytes(64 << 20);
                }
                let want = by_reference(&call, &q, &p, 3.0);
                let op = SamToNe::new(call);
                let log_beta = Var::new(-TAU.ln(), &Device::Cpu)?;
                let tau = Var::new(&[TAU], &Device::Cpu)?;
                let got = op.forward_with_metrics(&q, &p, Temperature::LogBeta(&log_beta));
                let Ok(want) = want else {
                    assert!(got.is_err(), "{name}: the reference refuses");
                    continue;
                };
                compared[usize::from(masked)] += 1;
                let (result, evaluation) = got?;
                assert_close(&numbers(&result), &[want.evaluation.loss], 1e-5, name);
                assert_eq!(evaluation.query_to_passage, want.evaluation.query_to_passage, "{name}");
                let gradients = (result * 3.0)?.backward()?;
                let dq = gradients.get(&q).unwrap();
                assert_eq!((dq.dtype(), dq.dims()), (dtype, q.dims()));
                assert_close(&numbers(dq), &want.grad_query, tolerance, name);
                assert_close(&numbers(gradients.get(&p).unwrap()), &want.grad_passage, tolerance, name);
                let derivative = numbers(gradients.get(&log_beta).unwrap());
                assert_close(&derivative, &[want.temperature.log_beta], 1e-4, name);
                let gradients = (op.forward(&q, &p, Temperature::Tau(&tau))? * 3.0)?.backward()?;
                assert_eq!(gradients.get(&tau).unwrap().dims(), [1]);
                assert_close(&numbers(gradients.get(&tau).unwrap()), &[want.temperature.tau], 1e-4, name);
            }
        }
    }
    assert_eq!(compared, [3 * Loss::PRESETS.len(); 2], "combinations that the reference does not refuse");
    Ok(())
}

#[test]
fn strided_and_transposed_inputs_give_the_same_gradients() -> Result<()> {
    let op = op(Loss::samtone_both());
    let wide = Var::from_tensor(&wave(ROWS, 8, 0.7))?;
    let tall = Var::from_tensor(&wave(DIM, PASSAGES, 0.9))?;
    let (q, p) = (wide.narrow(1, 2, DIM)?, tall.t()?);
    let strided = op.forward(&q, &p, Fixed)?.backward()?;
    let (q, p) = (Var::from_tensor(&q.contiguous()?)?, Var::from_tensor(&p.contiguous()?)?);
    let plain = op.forward(&q, &p, Fixed)?.backward()?;
    let got = strided.get(&wide).unwrap().narrow(1, 2, DIM)?;
    assert_eq!(numbers(&got), numbers(plain.get(&q).unwrap()));
    assert_eq!(numbers(&strided.get(&tall).unwrap().t()?), numbers(plain.get(&p).unwrap()));
    Ok(())
}

#[test]
fn frozen_towers_get_no_gradient_and_change_no_other() -> Result<()> {
    let op = op(Loss::samtone_both());
    let (q, p) = (Var::from_tensor(&wave(ROWS, DIM, 0.7))?, Var::from_tensor(&wave(PASSAGES, DIM, 0.9))?);
    let both = op.forward(&q, &p, Fixed)?.backward()?;
    let one = op.forward(&q, &p.detach(), Fixed)?.backward()?;
    assert!(one.get(&p).is_none());
    assert_eq!(numbers(one.get(&q).unwrap()), numbers(both.get(&q).unwrap()));
    let none = op.forward(&q.detach(), &p.detach(), Fixed)?;
    assert!(!none.track_op());
    assert_eq!(f64::from(none.to_scalar::<f32>()?), f64::from(op.evaluate(&q, &p, Fixed)?.loss as f32));
    Ok(())
}

/// Each option by itself reaches the computation: it changes the loss, to what the reference gives with it.
#[test]
fn each_option_alone_is_that_of_the_reference() -> Result<()> {
    const IDS: [i64; PASSAGES] = [1, 2, 1, 4, 5, 6, 2, 8, 5];
    const OWNERS: [i32; PASSAGES] = [-1, -1, -1, -1, -1, -1, 0, 3, -1];
    const WEIGHTS: [f32; ROWS] = [1.0, 0.5, 2.0, 0.0, 1.0, 1.0];
    const POSITIVES: [u32; ROWS] = [0, 1, 2, 3, 4, 4];
    const TEXTS: [i64; PASSAGES + 1] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]; // row i asks with text i for text i + 1
    type Set = (&'static str, fn(Call) -> Call);
    let sets: [Set; 10] = [
        ("query_ids", |call| call.with_query_ids(&IDS[..ROWS])),
        ("passage_ids", |call| call.with_passage_ids(IDS)),
        ("shared_ids", |call| call.with_query_ids(&TEXTS[..ROWS]).with_passage_ids(&TEXTS[1..]).with_shared_ids(true)),
        ("positives", |call| call.with_positives(POSITIVES)),
        ("weights", |call| call.with_weights(WEIGHTS)),
        ("margin", |call| call.with_margin(0.1)),
        ("owners", |call| call.with_hard_negative_owners(OWNERS, Scope::Own)),
        ("temperature", |call| call.with_temperature(0.2)),
        ("prefixes", |call| call.with_prefixes([2, DIM])),
        ("prefix_weights", |call| call.with_prefixes([2, DIM]).with_prefix_weights([0.5, 1.5])),
    ];
    let (q, p) = (Var::from_tensor(&wave(ROWS, DIM, 0.7))?, Var::from_tensor(&wave(PASSAGES, DIM, 0.9))?);
    let op = op(Loss::samtone_both());
    let plain = op.evaluate(&q, &p, Fixed)?.loss;
    for (name, set) in sets {
        let op = op.with(set);
        let want = by_reference(op.call(), &q, &p, 1.0).unwrap();
        assert!((want.evaluation.loss - plain).abs() > 1e-3, "{name} changes nothing");
        let (result, evaluation) = op.forward_with_metrics(&q, &p, Fixed)?;
        assert_close(&evaluation.row_losses, &want.evaluation.row_losses, 1e-5, name);
        assert_close(&[evaluation.loss], &[want.evaluation.loss], 1e-5, name);
        let gradients = result.backward()?;
        assert_close(&numbers(gradients.get(&q).unwrap()), &want.grad_query, 3e-5, name);
        assert_close(&numbers(gradients.get(&p).unwrap()), &want.grad_passage, 3e-5, name);
    }
    // What one batch has is not that of the next.
    assert_eq!(op.evaluate(&q, &p, Fixed)?.loss, plain);
    Ok(())
}

/// Every type, with prefixes that end before the embedding and a weight of 0 among theirs, with all masks: results of each prefix, and
/// gradients, which are 0 behind the last.
#[test]
fn prefixes_are_those_of_the_reference() -> Result<()> {
    let call = call(Loss::samtone_both())
        .with_passage_ids([1, 2, 1, 4, 5, 6, 2, 8, 5])
        .with_positives([0, 1, 2, 3, 4, 4])
        .with_weights([1.0, 0.5, 2.0, 0.0, 1.0, 1.0])
        .with_margin(0.4)
        .with_prefixes([1, 2, 4])
        .with_prefix_weights([0.25, 0.0, 2.0]);
    for (dtype, tolerance) in [(DType::F32, 3e-5), (DType::F16, 2e-3), (DType::BF16, 1e-2)] {
        let q = Var::from_tensor(&wave(ROWS, DIM, 0.7).to_dtype(dtype)?)?;
        let p = Var::from_tensor(&wave(PASSAGES, DIM, 0.9).to_dtype(dtype)?)?;
        let log_beta = Var::new(-TAU.ln(), &Device::Cpu)?;
        let want = by_reference(&call, &q, &p, 3.0).unwrap();
        let op = SamToNe::new(call.clone());
        let (result, evaluation) = op.forward_with_metrics(&q, &p, Temperature::LogBeta(&log_beta))?;
        for found in [&evaluation, &op.evaluate(&q, &p, Fixed)?] {
            assert_eq!(found.prefixes.iter().map(|x| (x.dim, x.weight)).collect::<Vec<_>>(), [(1, 0.25), (4, 2.0)]);
            for (got, want) in found.prefixes.iter().zip(&want.evaluation.prefixes) {
                assert_close(&[got.loss], &[want.loss], 1e-5, "loss of a prefix");
                assert_eq!(got.query_to_passage, want.query_to_passage);
                assert_eq!(got.passage_to_query, want.passage_to_query);
            }
        }
        assert_close(&numbers(&result), &[want.evaluation.loss], 1e-5, "loss");
        let gradients = (result * 3.0)?.backward()?;
        for (tower, want) in [(&q, &want.grad_query), (&p, &want.grad_passage)] {
            let got = gradients.get(tower).unwrap();
            assert_eq!(got.dtype(), dtype);
            assert_close(&numbers(got), want, tolerance, "gradient");
            assert!(numbers(&got.narrow(1, 4, 1)?).iter().all(|x| *x == 0.0), "behind the last prefix");
        }
        assert_close(&numbers(gradients.get(&log_beta).unwrap()), &[want.temperature.log_beta], 1e-4, "temperature");
    }
    Ok(())
}

/// The number in a tensor stands in for that of the call, which may then be any.
#[test]
fn a_tensor_replaces_the_temperature_of_the_call() -> Result<()> {
    let (q, p) = (wave(ROWS, DIM, 0.7), wave(PASSAGES, DIM, 0.9));
    let want = op(Loss::samtone_both()).evaluate(&q, &p, Fixed)?;
    let tau = Tensor::new(TAU, &Device::Cpu)?;
    for other in [0.5, f64::NAN] {
        let op = op(Loss::samtone_both()).with(|call| call.with_temperature(other));
        assert_eq!(op.evaluate(&q, &p, Temperature::Tau(&tau))?, want);
    }
    Ok(())
}

/// The CPU may leave nothing out, however much it is allowed to.
#[test]
fn tile_skipping_changes_no_bit() -> Result<()> {
    let (q, p) = (Var::from_tensor(&wave(ROWS, DIM, 0.7))?, Var::from_tensor(&wave(PASSAGES, DIM, 0.9))?);
    let tau = Var::new(TAU, &Device::Cpu)?;
    for (name, ..) in Loss::PRESETS {
        let plain = op(Loss::by_name(name).unwrap()).with(|call| call.with_margin(f64::INFINITY));
        let run = |op: SamToNe| -> Result<_> {
            let (loss, evaluation) = op.forward_with_metrics(&q, &p, Temperature::Tau(&tau))?;
            let gradients = loss.backward()?;
            Ok((evaluation, numbers(&loss), [&q, &p, &tau].map(|var| numbers(gradients.get(var).unwrap()))))
        };
        let want = run(plain.clone())?;
        for share in [1e-3, 0.999] {
            assert_eq!(run(plain.with(|call| call.with_tile_skipping(share)))?, want, "{name}, {share}");
        }
    }
    Ok(())
}

#[test]
fn any_one_argument_may_be_the_only_tracked_one() -> Result<()> {
    let op = op(Loss::samtone_both());
    let (q, p) = (Var::from_tensor(&wave(ROWS, DIM, 0.7))?, Var::from_tensor(&wave(PASSAGES, DIM, 0.9))?);
    let tau = Var::new(TAU, &Device::Cpu)?;
    let all = op.forward(&q, &p, Temperature::Tau(&tau))?.backward()?;
    for only in 0..3 {
        let var = |k: usize, var: &Var| if k == only { var.as_tensor().clone() } else { var.as_detached_tensor() };
        let result = op.forward(&var(0, &q), &var(1, &p), Temperature::Tau(&var(2, &tau)))?;
        let gradients = result.backward()?;
        for (k, var) in [&q, &p, &tau].into_iter().enumerate() {
            let (got, want) = (gradients.get(var), all.get(var).unwrap());
            assert_eq!(got.map(numbers), (k == only).then(|| numbers(want)), "argument {k}, tracked is {only}");
        }
    }
    Ok(())
}

#[test]
fn bad_input_gets_a_sentence() -> Result<()> {
    let op = op(Loss::samtone_query());
    let (q, p) = (wave(ROWS, DIM, 0.7), wave(PASSAGES, DIM, 0.9));
    let infinite = Tensor::new(f64::INFINITY, &Device::Cpu)?;
    let zero = (&q * 0.0)?;
    let lonely = op.with(|call| call.with_loss(Loss::decoupled()).with_passage_ids([7; PASSAGES]));
    let prefixes = |dims: &[usize]| op.with(|call| call.with_prefixes(dims));
    let late = Tensor::cat(&[&zero.narrow(1, 0, 2)?, &q.narrow(1, 2, DIM - 2)?], 1)?; // whose first entries are 0
    for (result, sentence) in [
        (op.forward(&q.flatten_all()?, &p, Fixed), "argument `query` is a tensor of shape [30]; allowed: a matrix"),
        (
            op.forward(&q, &p.to_dtype(DType::F64)?, Fixed),
            "argument `passage` is of type f64; allowed: f32, f16 or bf16",
        ),
        (op.forward(&q, &p.to_dtype(DType::F16)?, Fixed), "argument `passage` is of type f16; allowed: the type of"),
        (op.forward(&p, &q, Fixed), "argument `passage` is 6 rows"),
        (op.forward(&q.narrow(0, 0, 0)?, &p, Fixed), "argument `rows` is 0"),
        (op.with(|call| call.with_temperature(0.0)).forward(&q, &p, Fixed), "argument `temperature` is 0"),
        (op.forward(&q, &p, Temperature::LogBeta(&infinite)), "argument `log_beta` is inf"),
        (op.forward(&q, &p, Temperature::Tau(&q)), "argument `temperature` is a tensor of shape [6, 5]"),
        (op.with(|call| call.with_passage_ids([1])).forward(&q, &p, Fixed), "argument `passage_ids` is a slice of 1"),
        (
            op.with(|call| call.with_shared_ids(true).with_passage_ids([1; PASSAGES])).forward(&q, &p, Fixed),
            "argument `shared_ids` is true without query ids; allowed: false, or query ids and passage ids",
        ),
        (op.with(|call| call.with_margin(f64::NAN)).forward(&q, &p, Fixed), "argument `margin` is NaN"),
        (
            op.with(|call| call.with_tile_skipping(0.0)).forward(&q, &p, Fixed),
            "argument `tile_skipping` is 0; allowed: a number above 0",
        ),
        (
            op.with(|call| call.with_tile_skipping(1.0)).forward(&q, &p, Fixed),
            "argument `tile_skipping` is 1; allowed: a number above 0",
        ),
        (
            op.with(|call| call.with_tile_skipping(-1.0)).evaluate(&q, &p, Fixed).map(|_| zero.clone()),
            "argument `tile_skipping` is -1",
        ),
        (op.with(|call| call.with_tile_skipping(f64::NAN)).forward(&q, &p, Fixed), "argument `tile_skipping` is NaN"),
        (op.forward(&zero, &p, Fixed), "the query embedding in row 0 has norm zero"),
        (
            prefixes(&[4, 2]).forward(&q, &p, Fixed),
            "argument `prefixes` is 2 at position 1; allowed: ascending numbers",
        ),
        (prefixes(&[2, 6]).forward(&q, &p, Fixed), "argument `prefixes` is 6 at position 1; allowed: at most 5"),
        (
            prefixes(&[2, 4]).with(|call| call.with_prefix_weights([1.0])).forward(&q, &p, Fixed),
            "argument `prefix_weights` is a slice of 1 elements; allowed: 2, one for each prefix",
        ),
        (
            op.with(|call| call.with_prefix_weights([1.0])).forward(&q, &p, Fixed),
            "argument `prefix_weights` is given without `prefixes`",
        ),
        (
            prefixes(&[2, 4]).forward(&late, &p, Fixed),
            "the query embedding in row 0 has norm zero in its first 2 entries",
        ),
        (lonely.forward(&q, &p, Fixed), "row 0 has no negative left in group 0"),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.starts_with(sentence), "{error}");
    }
    op.with(|call| call.with_zero_norm(ZeroNorm::ZeroGradient)).forward(&zero, &p, Fixed)?;
    assert_eq!(numbers(&lonely.with(|call| call.with_no_negative(NoNegative::Zero)).forward(&q, &p, Fixed)?), [0.0]);
    let q = Var::from_tensor(&q)?;
    let error = (op.forward(&q, &p, Fixed)? * f64::INFINITY)?.backward().err().unwrap().to_string();
    assert!(error.starts_with("argument `upstream` is inf"), "{error}");
    Ok(())
}
