//! What a call computes, from scalars and strings: loss, temperature, margin, policies.

use crate::errors::{Refusal, invalid};
use pyo3::prelude::*;
use samtone::{Block, Group, Loss, NoNegative, Options, Scope, TemperatureGradient, ZeroNorm};

/// A loss from its text: the name of a preset, `pair(ALPHA)`, or `NAME|GROUP|GROUP…` with each group as
/// `COEFFICIENT:BLOCK+BLOCK…:COPIES`.
pub fn parse_loss(text: &str) -> Result<Loss, Refusal> {
    if let Some(alpha) = text.strip_prefix("pair(").and_then(|rest| rest.strip_suffix(')')) {
        return Ok(Loss::pair(number("loss", alpha)?)?);
    }
    let Some((name, groups)) = text.split_once('|') else {
        return Loss::by_name(text).map_err(|error| match error {
            samtone::Error::InvalidArgument { value, allowed, .. } => invalid("loss", value, allowed),
            other => other.into(),
        });
    };
    let groups = groups.split('|').map(parse_group).collect::<Result<Vec<_>, _>>()?;
    Ok(Loss::custom(name, groups)?)
}

fn parse_group(text: &str) -> Result<Group, Refusal> {
    let mut parts = text.split(':');
    let (Some(coefficient), Some(blocks), Some(copies), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(invalid("loss", format!("with the group {text:?}"), "groups COEFFICIENT:BLOCK+BLOCK:COPIES"));
    };
    let block = |name: &str| {
        let found = Block::ALL.into_iter().find(|block| block.name() == name);
        found.ok_or_else(|| invalid("blocks", format!("{name:?}"), Block::ALL.map(Block::name).join(", ")))
    };
    let blocks = blocks.split('+').filter(|name| !name.is_empty()).map(block).collect::<Result<Vec<_>, _>>()?;
    Ok(Group::new(number("coefficient", coefficient)?, &blocks, number("positive_copies", copies)?)?)
}

fn number<T: std::str::FromStr>(argument: &'static str, text: &str) -> Result<T, Refusal> {
    text.parse().map_err(|_| invalid(argument, format!("{text:?}"), "a number in its domain"))
}

/// Loss and options of a call.
#[pyclass(frozen, module = "samtone._native")]
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub loss: Loss,
    pub options: Options,
    pub scope: Scope,
    /// Whether ids of queries and passages name the same texts.
    pub shared_ids: bool,
    /// Whether the temperature was given as log β, and its derivative is wanted for that.
    log_beta: bool,
}

#[pymethods]
impl Settings {
    /// `temperature` is τ, or log β if `log_beta`; `own` has hard negatives seen by their owners alone; with `shared_ids` the ids of
    /// queries and passages name the same texts.
    #[new]
    #[pyo3(signature = (
        loss, temperature, *, log_beta=false, margin=None, zero_norm="error", workspace_bytes=None, tile_skipping=None, own=false,
        shared_ids=false, no_negative="error"
    ))]
    #[allow(clippy::too_many_arguments)] // a call across a language border
    fn new(
        loss: &str,
        temperature: f64,
        log_beta: bool,
        margin: Option<f64>,
        zero_norm: &str,
        workspace_bytes: Option<i64>,
        tile_skipping: Option<f64>,
        own: bool,
        shared_ids: bool,
        no_negative: &str,
    ) -> PyResult<Self> {
        let mut options = if log_beta {
            let limit = Options::MAX_TEMPERATURE.ln();
            Options::new((-temperature).exp()).map_err(|_| {
                let allowed = format!("a number from -{limit:.3} to {limit:.3}, the logarithm of 1/temperature");
                invalid("log_beta", temperature.to_string(), allowed)
            })?
        } else {
            Options::new(temperature).map_err(Refusal)?
        };
        if let Some(margin) = margin {
            options = options.with_margin(margin).map_err(Refusal)?;
        }
        if let Some(bytes) = workspace_bytes {
            let allowed = "a number of bytes of at least 0";
            let bytes = usize::try_from(bytes).map_err(|_| invalid("workspace_bytes", bytes.to_string(), allowed))?;
            options = options.with_workspace_bytes(bytes);
        }
        if let Some(share) = tile_skipping {
            options = options.with_tile_skipping(share).map_err(Refusal)?;
        }
        let policy = match zero_norm {
            "error" => ZeroNorm::Error,
            "zero_gradient" => ZeroNorm::ZeroGradient,
            other => return Err(invalid("zero_norm", format!("{other:?}"), "\"error\" or \"zero_gradient\"").into()),
        };
        let rows = match no_negative {
            "error" => NoNegative::Error,
            "zero" => NoNegative::Zero,
            other => return Err(invalid("no_negative", format!("{other:?}"), "\"error\" or \"zero\"").into()),
        };
        let options = options.with_zero_norm(policy).with_no_negative(rows);
        let scope = if own { Scope::Own } else { Scope::All };
        Ok(Self { loss: parse_loss(loss)?, options, scope, shared_ids, log_beta })
    }

    fn __repr__(&self) -> String {
        format!("Settings({}, temperature {})", self.loss, self.options.temperature())
    }
}

impl Settings {
    /// The derivative with respect to what the temperature was given as.
    pub fn derivative(&self, gradient: TemperatureGradient) -> f64 {
        if self.log_beta { gradient.log_beta } else { gradient.tau }
    }

    /// Whether the temperature is log β.
    pub fn is_log_beta(&self) -> bool {
        self.log_beta
    }
}

type GroupParts = (f64, Vec<&'static str>, u8);

/// Name and groups (coefficient, blocks, copies of the positive) of a loss in its textual form.
#[pyfunction]
pub fn describe_loss(loss: &str) -> PyResult<(String, Vec<GroupParts>)> {
    let loss = parse_loss(loss)?;
    let groups = loss
        .groups()
        .iter()
        .map(|g| (g.coefficient(), g.blocks().iter().map(|b| b.name()).collect(), g.positive_copies()));
    Ok((loss.name().to_owned(), groups.collect()))
}

/// Names of all presets.
#[pyfunction]
pub fn presets() -> Vec<&'static str> {
    Loss::PRESETS.iter().map(|(name, _)| *name).collect()
}
