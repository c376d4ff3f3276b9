//! What a call computes, from one text and one number: loss, options and temperature.
//!
//! The text is a line `NAME=VALUE` for each option, values and lists as Python's `repr` spells them, and then the loss as `loss=TEXT`. A new
//! option of the crate is an arm of [`Settings::option`], and a line of `Options` in python/samtone/options.py.

use crate::errors::{Refusal, invalid};
use pyo3::prelude::*;
use samtone::distributed::Reduction;
use samtone::{Block, Call, Group, Loss, NoNegative, Scope, Temperature, TemperatureGradient, ZeroNorm};

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

/// The value of an option that is a number; `None` leaves the option as it is.
fn optional<T: std::str::FromStr>(name: &'static str, value: &str, allowed: &str) -> Result<Option<T>, Refusal> {
    if value == "None" {
        return Ok(None);
    }
    value.parse().map(Some).map_err(|_| invalid(name, value, allowed))
}

/// The values of an option that is a list of numbers; `None` leaves the option as it is.
fn list<T: std::str::FromStr>(name: &'static str, value: &str, allowed: &str) -> Result<Option<Vec<T>>, Refusal> {
    if value == "None" {
        return Ok(None);
    }
    let items = value.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let items = items.ok_or_else(|| invalid(name, value, allowed))?.split(", ").filter(|item| !item.is_empty());
    let number =
        |(k, item): (usize, &str)| item.parse().map_err(|_| invalid(name, format!("{item} at position {k}"), allowed));
    items.enumerate().map(number).collect::<Result<_, _>>().map(Some)
}

/// The value of an option that is one of two words.
fn choice<T: Copy>(name: &'static str, value: &str, words: [(&str, T); 2]) -> Result<T, Refusal> {
    let found =
        words.iter().find(|(word, _)| value.strip_prefix('\'').and_then(|v| v.strip_suffix('\'')) == Some(word));
    let allowed = || format!("{:?} or {:?}", words[0].0, words[1].0);
    found.map(|(_, meaning)| *meaning).ok_or_else(|| invalid(name, value, allowed()))
}

fn flag(name: &'static str, value: &str) -> Result<bool, Refusal> {
    match value {
        "True" => Ok(true),
        "False" => Ok(false),
        _ => Err(invalid(name, value, "True or False")),
    }
}

/// Loss, options and temperature of a call.
#[pyclass(frozen, module = "samtone._native")]
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub call: Call,
    pub scope: Scope,
    /// What processes that make the call together do with gradients.
    pub reduction: Reduction,
    /// Whether the temperature was given as log β, and its derivative is wanted for that.
    log_beta: bool,
}

#[pymethods]
impl Settings {
    /// `temperature` is τ, or log β if the text says so.
    #[new]
    fn new(text: &str, temperature: f64) -> PyResult<Self> {
        let (options, loss) = match text.strip_prefix("loss=") {
            Some(loss) => ("", loss),
            None => {
                text.split_once("\nloss=").ok_or_else(|| invalid("text", format!("{text:?}"), "a text with a loss"))?
            }
        };
        let call = Call::new(parse_loss(loss)?, temperature);
        let mut settings = Self { call, scope: Scope::All, reduction: Reduction::Mean, log_beta: false };
        for line in options.lines() {
            let (name, value) = line.split_once('=').unwrap_or((line, ""));
            settings = settings.option(name, value)?;
        }
        if settings.log_beta {
            settings.call = settings.call.at(Temperature::LogBeta(temperature)).map_err(Refusal)?.into_owned();
        }
        // Whether ids come with `shared_ids` is known once there are ids.
        settings.call.clone().with_shared_ids(false).check().map_err(Refusal)?;
        Ok(settings)
    }

    fn __repr__(&self) -> String {
        format!("Settings({}, temperature {})", self.call.loss(), self.call.temperature())
    }
}

impl Settings {
    /// These with one option more.
    fn option(mut self, name: &str, value: &str) -> Result<Self, Refusal> {
        let call = self.call;
        self.call = match name {
            "log_beta" => {
                self.log_beta = flag("log_beta", value)?;
                call
            }
            "hard_negative_scope" => {
                self.scope = choice("hard_negative_scope", value, [("all", Scope::All), ("own", Scope::Own)])?;
                call
            }
            "shared_ids" => call.with_shared_ids(flag("shared_ids", value)?),
            "zero_norm" => {
                let words = [("error", ZeroNorm::Error), ("zero_gradient", ZeroNorm::ZeroGradient)];
                call.with_zero_norm(choice("zero_norm", value, words)?)
            }
            "no_negative" => {
                let words = [("error", NoNegative::Error), ("zero", NoNegative::Zero)];
                call.with_no_negative(choice("no_negative", value, words)?)
            }
            "margin" => match optional("margin", value, "a finite number, or infinity for no margin")? {
                Some(margin) => call.with_margin(margin),
                None => call,
            },
            "workspace_bytes" => match optional("workspace_bytes", value, "a number of bytes of at least 0")? {
                Some(bytes) => call.with_workspace_bytes(bytes),
                None => call,
            },
            "tile_skipping" => match optional("tile_skipping", value, "a number above 0 and below 1")? {
                Some(share) => call.with_tile_skipping(share),
                None => call,
            },
            "prefixes" => match list("prefixes", value, "ascending numbers of entries")? {
                Some(prefixes) => call.with_prefixes(prefixes),
                None => call,
            },
            "prefix_weights" => match list("prefix_weights", value, "a number for each prefix")? {
                Some(weights) => call.with_prefix_weights(weights),
                None => call,
            },
            // Which group it is matters to Python alone, which exchanges the messages.
            "group" if value == "None" || (value.len() > 2 && value.starts_with(['\'', '"'])) => call,
            "group" => return Err(invalid("group", value, "the name of a group of processes, or None")),
            "reduction" => {
                let words = [("mean", Reduction::Mean), ("sum", Reduction::Sum)];
                self.reduction = choice("reduction", value, words)?;
                call
            }
            _ => return Err(invalid("text", format!("with an option {name:?}"), "options that this version has")),
        };
        Ok(self)
    }

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
    Loss::PRESETS.iter().map(|(name, ..)| *name).collect()
}
