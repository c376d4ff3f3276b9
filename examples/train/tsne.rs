//! Exact t-SNE (van der Maaten & Hinton 2008) for a few hundred points, deterministic for a seed. In place of the crate bhtsne, because the
//! pictures of a report must come out alike on every run, and these are 100 lines without a dependency.

/// Descent steps.
const STEPS: usize = 350;
/// The attraction is exaggerated at first, so that clusters form before they spread.
const EXAGGERATED_STEPS: usize = 100;
const EXAGGERATION: f64 = 12.0;

/// Places each of the `points` (rows of `dim` columns, best of norm 1) in the plane. `perplexity` is the effective number of
/// neighbours.
pub fn embed(points: &[f32], dim: usize, perplexity: f64, seed: u64) -> Vec<[f64; 2]> {
    let count = points.len() / dim;
    if count < 2 {
        return vec![[0.0; 2]; count];
    }
    let affinities = affinities(points, dim, perplexity.min((count - 1) as f64 / 3.0).max(1.0));
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut place: Vec<[f64; 2]> = (0..count).map(|_| [rng.f64() - 0.5, rng.f64() - 0.5].map(|x| x * 1e-2)).collect();
    let mut velocity = vec![[0.0; 2]; count];
    let mut gain = vec![[1.0f64; 2]; count];
    let rate = (count as f64 / EXAGGERATION).max(50.0);
    let mut closeness = vec![0.0; count * count];
    for step in 0..STEPS {
        let early = step < EXAGGERATED_STEPS;
        let (exaggeration, momentum) = if early { (EXAGGERATION, 0.5) } else { (1.0, 0.8) };
        let mut total = 0.0;
        for i in 0..count {
            for j in 0..i {
                let (x, y) = (place[i][0] - place[j][0], place[i][1] - place[j][1]);
                let near = 1.0 / (1.0 + x * x + y * y);
                closeness[i * count + j] = near;
                closeness[j * count + i] = near;
                total += 2.0 * near;
            }
        }
        let old = place.clone();
        for i in 0..count {
            let mut force = [0.0; 2];
            for j in 0..count {
                let near = closeness[i * count + j];
                let pull = 4.0 * (exaggeration * affinities[i * count + j] - near / total) * near;
                force[0] += pull * (old[i][0] - old[j][0]);
                force[1] += pull * (old[i][1] - old[j][1]);
            }
            for axis in 0..2 {
                let same_way = (force[axis] > 0.0) == (velocity[i][axis] > 0.0);
                gain[i][axis] = if same_way { (gain[i][axis] * 0.8).max(0.01) } else { gain[i][axis] + 0.2 };
                velocity[i][axis] = momentum * velocity[i][axis] - rate * gain[i][axis] * force[axis];
                place[i][axis] += velocity[i][axis];
            }
        }
    }
    place
}

/// Symmetric joint probabilities, count × count, that sum to 1.
fn affinities(points: &[f32], dim: usize, perplexity: f64) -> Vec<f64> {
    let count = points.len() / dim;
    let row = |i: usize| &points[i * dim..][..dim];
    let mut joint = vec![0.0; count * count];
    for i in 0..count {
        let distances: Vec<f64> =
            (0..count).map(|j| row(i).iter().zip(row(j)).map(|(x, y)| f64::from(x - y).powi(2)).sum()).collect();
        // The nearest other point sets the zero of the exponent, so that far outliers do not underflow.
        let nearest = (0..count).filter(|j| *j != i).map(|j| distances[j]).fold(f64::INFINITY, f64::min);
        let conditional = |beta: f64| -> (Vec<f64>, f64) {
            let weights: Vec<f64> =
                (0..count).map(|j| if j == i { 0.0 } else { (-beta * (distances[j] - nearest)).exp() }).collect();
            let sum: f64 = weights.iter().sum();
            let entropy = weights.iter().filter(|w| **w > 0.0).map(|w| -(w / sum) * (w / sum).ln()).sum();
            (weights.into_iter().map(|w| w / sum).collect(), entropy)
        };
        // The entropy falls as β grows: bisect on a logarithmic scale.
        let (mut low, mut high) = (1e-6f64, 1e9f64);
        for _ in 0..60 {
            let middle = (low * high).sqrt();
            if conditional(middle).1 > perplexity.ln() { low = middle } else { high = middle }
        }
        for (j, p) in conditional(low).0.into_iter().enumerate() {
            joint[i * count + j] += p / (2 * count) as f64;
            joint[j * count + i] += p / (2 * count) as f64;
        }
    }
    joint
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two clouds of 30 points in 8 dimensions, far apart.
    fn clouds() -> Vec<f32> {
        let mut rng = fastrand::Rng::with_seed(3);
        (0..60).flat_map(|i| (0..8).map(|_| rng.f32() + if i < 30 { 0.0 } else { 9.0 }).collect::<Vec<_>>()).collect()
    }

    #[test]
    fn affinities_are_a_distribution_of_the_perplexity() {
        let p = affinities(&clouds(), 8, 10.0);
        assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        let across: f64 = (0..30).flat_map(|i| (30..60).map(move |j| (i, j))).map(|(i, j)| p[i * 60 + j]).sum();
        assert!(across < 1e-6, "{across}");
        assert!((0..60).all(|i| (0..60).all(|j| p[i * 60 + j] == p[j * 60 + i])));
    }

    #[test]
    fn clouds_stay_apart_and_runs_repeat() {
        let place = embed(&clouds(), 8, 10.0, 1);
        let distance = |i: usize, j: usize| (place[i][0] - place[j][0]).hypot(place[i][1] - place[j][1]);
        for i in 0..60 {
            let nearest =
                (0..60).filter(|j| *j != i).min_by(|a, b| distance(i, *a).total_cmp(&distance(i, *b))).unwrap();
            assert_eq!(i < 30, nearest < 30, "{i} lies next to {nearest}");
        }
        let span = (0..60).map(|i| distance(0, i)).fold(0.0, f64::max);
        let closest = (0..60)
            .flat_map(|i| (0..i).map(move |j| (i, j)))
            .map(|(i, j)| distance(i, j))
            .fold(f64::INFINITY, f64::min);
        assert!(span < 1e3 && closest > span / 1e3, "no collapse, no explosion: {closest} {span}");
        assert_eq!(place, embed(&clouds(), 8, 10.0, 1));
        assert!(place.iter().flatten().all(|x| x.is_finite()));
    }

    #[test]
    fn few_or_equal_points_do_no_harm() {
        assert_eq!(embed(&[1.0, 2.0], 2, 30.0, 1).len(), 1);
        assert!(embed(&[1.0; 20], 2, 30.0, 1).iter().flatten().all(|x| x.is_finite()));
    }
}
