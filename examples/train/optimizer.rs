//! Optimisers. Both divide by the size of past gradients, so losses that differ by a factor train at the same rate.

/// Adagrad with one accumulator for each row of a table; rows that a batch does not touch cost nothing.
#[derive(Debug)]
pub struct RowAdagrad {
    /// Sum over steps of the mean squared gradient, one for each row.
    pub accumulators: Vec<f32>,
}

impl RowAdagrad {
    /// For a table of so many rows.
    pub fn new(rows: usize) -> Self {
        Self { accumulators: vec![0.0; rows] }
    }

    /// row ← row − rate · g / √(Σ mean g²).
    pub fn step(row: &mut [f32], accumulator: &mut f32, gradient: &[f32], rate: f32) {
        let mean_square = gradient.iter().map(|g| g * g).sum::<f32>() / gradient.len() as f32;
        *accumulator += mean_square;
        if *accumulator > 0.0 {
            let scale = rate / accumulator.sqrt();
            row.iter_mut().zip(gradient).for_each(|(x, g)| *x -= scale * g);
        }
    }
}

/// Adam (Kingma & Ba 2015) for dense parameters.
#[derive(Debug)]
pub struct Adam {
    mean: Vec<f32>,
    square: Vec<f32>,
    steps: i32,
}

impl Adam {
    const BETA_1: f32 = 0.9;
    const BETA_2: f32 = 0.99;
    const EPSILON: f32 = 1e-12;

    /// For so many parameters.
    pub fn new(parameters: usize) -> Self {
        Self { mean: vec![0.0; parameters], square: vec![0.0; parameters], steps: 0 }
    }

    /// One step along −gradient.
    pub fn step(&mut self, parameters: &mut [f32], gradient: &[f32], rate: f32) {
        self.steps += 1;
        let mean_scale = 1.0 / (1.0 - Self::BETA_1.powi(self.steps));
        let square_scale = 1.0 / (1.0 - Self::BETA_2.powi(self.steps));
        let moments = self.mean.iter_mut().zip(&mut self.square);
        for ((x, g), (m, v)) in parameters.iter_mut().zip(gradient).zip(moments) {
            *m = Self::BETA_1 * *m + (1.0 - Self::BETA_1) * g;
            *v = Self::BETA_2 * *v + (1.0 - Self::BETA_2) * g * g;
            *x -= rate * *m * mean_scale / ((*v * square_scale).sqrt() + Self::EPSILON);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_steps_have_the_size_of_the_rate() {
        let mut row = [1.0, 1.0];
        let mut accumulator = 0.0;
        RowAdagrad::step(&mut row, &mut accumulator, &[30.0, -30.0], 0.1);
        assert!((row[0] - 0.9).abs() < 1e-6 && (row[1] - 1.1).abs() < 1e-6);
        RowAdagrad::step(&mut row, &mut accumulator, &[0.0, 0.0], 0.1);
        assert!((row[0] - 0.9).abs() < 1e-6);
        let mut parameters = [1.0, 1.0];
        Adam::new(2).step(&mut parameters, &[1e-3, -50.0], 0.1);
        assert!((parameters[0] - 0.9).abs() < 1e-4 && (parameters[1] - 1.1).abs() < 1e-4);
    }

    #[test]
    fn adam_finds_the_minimum() {
        let mut x = [3.0];
        let mut adam = Adam::new(1);
        for _ in 0..400 {
            let gradient = [2.0 * (x[0] - 1.0)];
            adam.step(&mut x, &gradient, 0.05);
        }
        assert!((x[0] - 1.0).abs() < 0.02, "{}", x[0]);
    }
}
