//! How a framework's program gives the temperature of a call. For adapters: programs without one use [`Call`] alone.

use crate::call::Call;
use crate::error::{Error, Result};
use crate::output::TemperatureGradient;
use std::borrow::Cow;

/// Whether the temperature of a call is a constant, or the number in a tensor, which may be learned. `T` is the tensor of a framework;
/// once an adapter has read it, it is the number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Temperature<T> {
    /// That of the call, [`Call::temperature`]: a constant.
    Fixed,
    /// A tensor that holds τ; its gradient is ∂L/∂τ.
    Tau(T),
    /// A tensor that holds log β = −log τ, the log-scale that CLIP learns; its gradient is ∂L/∂log β.
    LogBeta(T),
}

impl<T> Temperature<T> {
    /// The tensor that holds it, if one does.
    pub fn tensor(&self) -> Option<&T> {
        match self {
            Self::Fixed => None,
            Self::Tau(x) | Self::LogBeta(x) => Some(x),
        }
    }

    /// The same with what `map` makes of the tensor.
    ///
    /// # Errors
    /// Those of `map`.
    pub fn try_map<U, E>(
        self,
        map: impl FnOnce(T) -> std::result::Result<U, E>,
    ) -> std::result::Result<Temperature<U>, E> {
        Ok(match self {
            Self::Fixed => Temperature::Fixed,
            Self::Tau(x) => Temperature::Tau(map(x)?),
            Self::LogBeta(x) => Temperature::LogBeta(map(x)?),
        })
    }

    /// The derivative with respect to the number that the tensor holds.
    pub fn derivative(&self, gradient: TemperatureGradient) -> f64 {
        match self {
            Self::Fixed | Self::Tau(_) => gradient.tau,
            Self::LogBeta(_) => gradient.log_beta,
        }
    }
}

impl Call {
    /// This call at a temperature that has been read.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a log β that is not that of a temperature from 1e-6 to 1e6.
    pub fn at(&self, temperature: Temperature<f64>) -> Result<Cow<'_, Self>> {
        let tau = match temperature {
            Temperature::Fixed => return Ok(Cow::Borrowed(self)),
            Temperature::Tau(tau) => tau,
            Temperature::LogBeta(log_beta) => {
                let limit = Self::MAX_TEMPERATURE.ln();
                if !(-limit..=limit).contains(&log_beta) {
                    let allowed = format!("a number from -{limit:.3} to {limit:.3}, the logarithm of 1/τ");
                    return Err(Error::invalid("log_beta", log_beta.to_string(), allowed));
                }
                // Rounding may lead the largest and smallest logarithms beyond the bounds of τ.
                (-log_beta).exp().clamp(Self::MIN_TEMPERATURE, Self::MAX_TEMPERATURE)
            }
        };
        Ok(Cow::Owned(self.clone().with_temperature(tau)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::Loss;

    #[test]
    fn a_call_takes_its_own_temperature_or_that_of_the_tensor() {
        let call = Call::new(Loss::samtone_both(), 0.5).with_query_ids([1, 2]);
        assert_eq!(*call.at(Temperature::Fixed).unwrap(), call);
        assert_eq!(*call.at(Temperature::Tau(0.1)).unwrap(), call.clone().with_temperature(0.1));
        let log_beta = call.at(Temperature::LogBeta(2.0)).unwrap();
        assert_eq!(*log_beta, call.clone().with_temperature((-2.0_f64).exp()));
        // What is wrong with a τ is found with everything else.
        assert!(call.at(Temperature::Tau(f64::NAN)).unwrap().check().is_err());
    }

    #[test]
    fn every_temperature_has_a_log_beta_and_others_are_refused() {
        let call = Call::new(Loss::samtone_both(), 0.5);
        for tau in [Call::MIN_TEMPERATURE, 0.01, 1.0, Call::MAX_TEMPERATURE] {
            assert_eq!(call.at(Temperature::LogBeta(-tau.ln())).unwrap().check(), Ok(()), "{tau}");
        }
        for log_beta in [13.82, -13.82, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let error = call.at(Temperature::LogBeta(log_beta)).unwrap_err().to_string();
            let sentence =
                format!("argument `log_beta` is {log_beta}; allowed: a number from -13.816 to 13.816, the log");
            assert!(error.starts_with(&sentence), "{error}");
        }
    }

    #[test]
    fn the_derivative_is_that_of_the_number_in_the_tensor() {
        let gradient = TemperatureGradient { tau: 1.0, log_beta: 2.0 };
        assert_eq!(Temperature::Tau(()).derivative(gradient), 1.0);
        assert_eq!(Temperature::LogBeta(()).derivative(gradient), 2.0);
    }
}
