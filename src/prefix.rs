//! Matryoshka prefixes: which leading entries of an embedding are trained as an embedding of their own, and how much each counts.
//!
//! A loss of prefixes d₁ < … < d_K is Σ_k v_k times the whole loss of the embeddings that are cut off after d_k entries.

use crate::call::Call;
use crate::error::{Error, Result};
use crate::loss::Group;

/// The first `dim` entries of every embedding, and the weight of their loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prefix {
    /// d_k.
    pub dim: usize,
    /// v_k.
    pub weight: f64,
}

/// An error unless the lists may belong together. Their lengths and values are checked, but not yet against an embedding's length.
pub(crate) fn check(prefixes: Option<&[usize]>, weights: Option<&[f64]>) -> Result<()> {
    if let Some(dims) = prefixes {
        if dims.is_empty() {
            return Err(Error::invalid("prefixes", "an empty list", "at least one prefix"));
        }
        let below = |k: usize| if k == 0 { 0 } else { dims[k - 1] };
        if let Some(k) = (0..dims.len()).find(|&k| dims[k] <= below(k)) {
            let allowed = format!("ascending numbers of entries, here at least {}", below(k) + 1);
            return Err(Error::invalid("prefixes", format!("{} at position {k}", dims[k]), allowed));
        }
    }
    let Some(weights) = weights else { return Ok(()) };
    let Some(dims) = prefixes else {
        return Err(Error::invalid("prefix_weights", "given without `prefixes`", "none, or `prefixes` with them"));
    };
    if weights.len() != dims.len() {
        let allowed = format!("{}, one for each prefix", dims.len());
        return Err(Error::invalid("prefix_weights", format!("a slice of {} elements", weights.len()), allowed));
    }
    let (least, most) = (Group::MIN_COEFFICIENT, Group::MAX_COEFFICIENT);
    if let Some(k) = weights.iter().position(|&w| !(w == 0.0 || (least..=most).contains(&w))) {
        let (value, allowed) =
            (format!("{:?} at position {k}", weights[k]), format!("0, or from {least:e} to {most:e}"));
        return Err(Error::invalid("prefix_weights", value, allowed));
    }
    if weights.iter().all(|&w| w == 0.0) {
        return Err(Error::invalid("prefix_weights", "0 for every prefix", "at least one weight above 0"));
    }
    Ok(())
}

/// The prefixes of embeddings of `dim` entries whose weight is above 0, shortest first. A call without prefixes has one: the whole
/// embedding, with weight 1. So a list has at least one.
///
/// # Errors
/// [`Error::InvalidArgument`] for a prefix that is longer than the embeddings.
pub(crate) fn of(call: &Call, dim: usize) -> Result<Vec<Prefix>> {
    let Some(dims) = call.prefixes() else { return Ok(vec![Prefix { dim, weight: 1.0 }]) };
    if let Some(k) = dims.iter().position(|&d| d > dim) {
        let allowed = format!("at most {dim}, the dimension of the embeddings");
        return Err(Error::invalid("prefixes", format!("{} at position {k}", dims[k]), allowed));
    }
    let weight = |k: usize| call.prefix_weights().map_or(1.0, |weights| weights[k]);
    let prefixes = dims.iter().enumerate().map(|(k, &dim)| Prefix { dim, weight: weight(k) });
    Ok(prefixes.filter(|p| p.weight > 0.0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::Loss;

    #[test]
    fn a_weight_of_zero_leaves_its_prefix_out() {
        let call = Call::new(Loss::clip(), 0.1);
        assert_eq!(of(&call, 7).unwrap(), [Prefix { dim: 7, weight: 1.0 }]);
        let call = call.with_prefixes([2, 3, 5]).with_prefix_weights([0.5, 0.0, 2.0]);
        assert_eq!(of(&call, 7).unwrap(), [Prefix { dim: 2, weight: 0.5 }, Prefix { dim: 5, weight: 2.0 }]);
        let error = of(&call, 4).unwrap_err().to_string();
        assert_eq!(
            error,
            "argument `prefixes` is 5 at position 2; allowed: at most 4, the dimension of the embeddings"
        );
    }
}
