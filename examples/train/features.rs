//! Text → weighted hash buckets: words and character n-grams, so that unseen identifiers still share pieces with seen ones.

use super::data::text_hash;
use rayon::prelude::*;

/// How texts become features.
#[derive(Debug, Clone, Copy)]
pub struct Featuriser {
    /// Rows of the embedding table, a power of two.
    pub buckets: usize,
    /// Words after these are cut off.
    pub max_words: usize,
    /// Length of the character n-grams.
    pub ngram: usize,
}

/// Bucket counts of many texts, in compressed rows.
#[derive(Debug, Default)]
pub struct Counts {
    offsets: Vec<usize>,
    entries: Vec<(u32, f32)>,
}

/// Weighted buckets of many texts; the weights of a text sum to 1, so that a pooled embedding is a weighted mean.
#[derive(Debug, Default)]
pub struct Features {
    offsets: Vec<usize>,
    entries: Vec<(u32, f32)>,
}

const WORD: u64 = 1;
const NGRAM: u64 = 2;

/// Lower-case words: runs of letters and digits, cut at the humps of camelCase and between letters and digits.
pub fn words(text: &str) -> impl Iterator<Item = String> {
    let mut chars = text.chars().peekable();
    std::iter::from_fn(move || {
        while chars.next_if(|c| !c.is_alphanumeric()).is_some() {}
        let mut word = String::new();
        let mut last: Option<char> = None;
        while let Some(&c) = chars.peek() {
            if !c.is_alphanumeric() {
                break;
            }
            if let Some(last) = last {
                let hump = c.is_uppercase() && !last.is_uppercase();
                if hump || c.is_numeric() != last.is_numeric() {
                    break;
                }
            }
            word.extend(c.to_lowercase());
            last = Some(c);
            chars.next();
        }
        (!word.is_empty()).then_some(word)
    })
}

impl Featuriser {
    fn bucket(&self, kind: u64, piece: &str) -> u32 {
        (text_hash(piece, kind) as usize & (self.buckets - 1)) as u32
    }

    fn text(&self, text: &str) -> Vec<(u32, f32)> {
        let mut buckets = Vec::new();
        let mut padded = String::new();
        for word in words(text).take(self.max_words) {
            buckets.push(self.bucket(WORD, &word));
            padded.clear();
            padded.push('<');
            padded.push_str(&word);
            padded.push('>');
            let starts: Vec<usize> = padded.char_indices().map(|(at, _)| at).chain([padded.len()]).collect();
            // A word that is one n-gram with its brackets is already there.
            if starts.len() > self.ngram + 1 {
                buckets
                    .extend(starts.windows(self.ngram + 1).map(|w| self.bucket(NGRAM, &padded[w[0]..w[self.ngram]])));
            }
        }
        if buckets.is_empty() {
            // Punctuation only: one common bucket, so that no text has an embedding of norm zero.
            buckets.push(self.bucket(WORD, ""));
        }
        buckets.sort_unstable();
        buckets.chunk_by(|a, b| a == b).map(|run| (run[0], run.len() as f32)).collect()
    }

    /// Counts for each text, in order.
    pub fn counts<'a>(&self, texts: impl IntoIterator<Item = &'a str>) -> Counts {
        let texts: Vec<&str> = texts.into_iter().collect();
        let rows: Vec<Vec<(u32, f32)>> = texts.into_par_iter().map(|t| self.text(t)).collect();
        let mut counts = Counts { offsets: vec![0], entries: Vec::new() };
        for row in rows {
            counts.entries.extend(row);
            counts.offsets.push(counts.entries.len());
        }
        counts
    }
}

/// Inverse document frequency: ln((1 + n) / (1 + n_bucket)) + 1 over training texts, so that `the` and `fn` start out small.
pub struct InverseFrequency(Vec<f32>);

impl InverseFrequency {
    /// From the training texts of both towers.
    pub fn fit(buckets: usize, texts: &[&Counts]) -> Self {
        let mut seen = vec![0u32; buckets];
        for counts in texts {
            for (bucket, _) in &counts.entries {
                seen[*bucket as usize] += 1;
            }
        }
        let total: usize = texts.iter().map(|c| c.offsets.len() - 1).sum();
        Self(seen.into_iter().map(|n| ((1 + total) as f32 / (1 + n) as f32).ln() + 1.0).collect())
    }

    /// One for each bucket.
    pub fn weights(&self) -> &[f32] {
        &self.0
    }

    /// (1 + ln count) · idf, scaled to sum 1.
    pub fn weigh(&self, counts: Counts) -> Features {
        let Counts { offsets, mut entries } = counts;
        for span in offsets.windows(2) {
            let row = &mut entries[span[0]..span[1]];
            for (bucket, weight) in row.iter_mut() {
                *weight = (1.0 + weight.ln()) * self.0[*bucket as usize];
            }
            let total: f32 = row.iter().map(|(_, w)| w).sum();
            row.iter_mut().for_each(|(_, w)| *w /= total);
        }
        Features { offsets, entries }
    }
}

impl Features {
    /// Number of texts.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// (bucket, weight) of a text, buckets ascending.
    pub fn row(&self, text: usize) -> &[(u32, f32)] {
        &self.entries[self.offsets[text]..self.offsets[text + 1]]
    }

    /// Mean number of buckets per text.
    pub fn mean_buckets(&self) -> f64 {
        self.entries.len() as f64 / self.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEATURISER: Featuriser = Featuriser { buckets: 1 << 20, max_words: 8, ngram: 3 };

    #[test]
    fn words_of_code_and_prose() {
        let words = |t: &str| words(t).collect::<Vec<_>>();
        assert_eq!(words("fn parse_HTTPHeader2(&self)"), ["fn", "parse", "httpheader", "2", "self"]);
        assert_eq!(words("camelCase, Straße — ÜBER x86_64"), ["camel", "case", "straße", "über", "x", "86", "64"]);
        assert!(words(" ->{}!").is_empty());
    }

    #[test]
    fn counts_have_words_and_ngrams() {
        assert_eq!(FEATURISER.text("cat").len(), 4, "the word and <ca, cat, at>");
        assert_eq!(FEATURISER.text("a").len(), 1);
        let repeated = FEATURISER.text("cat CAT");
        assert!(repeated.iter().all(|(_, n)| *n == 2.0), "{repeated:?}");
        assert_eq!(FEATURISER.text("… !").len(), 1, "no text is empty");
        let many = "word ".repeat(50);
        assert_eq!(FEATURISER.text(&many)[0].1, 8.0, "max_words");
        assert!(FEATURISER.text("größe").len() == 6, "n-grams are cut between characters");
    }

    #[test]
    fn weights_sum_to_one_and_rare_buckets_weigh_more() {
        let texts = ["the cat", "the dog", "the cow"];
        let counts = FEATURISER.counts(texts);
        let idf = InverseFrequency::fit(FEATURISER.buckets, &[&counts]);
        let features = idf.weigh(counts);
        assert_eq!(features.len(), 3);
        for text in 0..3 {
            assert!((features.row(text).iter().map(|(_, w)| w).sum::<f32>() - 1.0).abs() < 1e-5);
        }
        let weight =
            |piece: &str| features.row(0).iter().find(|(b, _)| *b == FEATURISER.bucket(WORD, piece)).unwrap().1;
        assert!(weight("cat") > weight("the"));
    }
}
