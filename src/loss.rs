//! The loss family: softmax groups over four blocks of cosines. A new variant is one row of [`Loss::PRESETS`].

use crate::error::{Error, Result};
use std::fmt;

/// One set of candidate negatives of a row. With x̂ = x/‖x‖ and π(i) the passage of row i's positive:
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Block {
    /// q̂ᵢ·p̂ⱼ over passages j: in-batch and hard negatives, query → passage.
    QP,
    /// p̂_{π(i)}·q̂ⱼ over queries j: in-batch negatives, passage → query.
    PQ,
    /// q̂ᵢ·q̂ⱼ over queries j: same-tower negatives of the query tower.
    QQ,
    /// p̂_{π(i)}·p̂ⱼ over passages j: same-tower negatives of the passage tower.
    PP,
}

impl Block {
    /// All blocks, in the order every per-block array of the crate uses.
    pub const ALL: [Self; 4] = [Self::QP, Self::PQ, Self::QQ, Self::PP];

    /// Position in [`Block::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Lower-case name: `qp`, `pq`, `qq`, `pp`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::QP => "qp",
            Self::PQ => "pq",
            Self::QQ => "qq",
            Self::PP => "pp",
        }
    }

    /// Whether the candidates of the block are passages (QP, PP) rather than queries (PQ, QQ).
    pub const fn candidates_are_passages(self) -> bool {
        matches!(self, Self::QP | Self::PP)
    }
}

/// One softmax of a loss:
///
/// ℓ_gi = log( e_g·exp(β s⁺ᵢ) + Σ_{b∈blocks} Σ_{j kept} exp(β s^b_ij) ), contributing c_g Σᵢ w̃ᵢ (ℓ_gi − β s⁺ᵢ).
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    coefficient: f64,
    blocks: Vec<Block>,
    positive_copies: u8,
}

impl Group {
    /// Smallest coefficient above 0. Within these bounds no backend's f32 loses a coefficient or what it multiplies.
    pub const MIN_COEFFICIENT: f64 = 1e-30;
    /// Largest coefficient.
    pub const MAX_COEFFICIENT: f64 = 1e30;

    /// A group with coefficient c, 0 or from 1e-30 to 1e30, at least one block (none twice), and e = 0, 1 or 2 copies of the
    /// positive in the denominator.
    pub fn new(coefficient: f64, blocks: &[Block], positive_copies: u8) -> Result<Self> {
        if !is_coefficient(coefficient) {
            let allowed = format!("0, or a number from {:e} to {:e}", Self::MIN_COEFFICIENT, Self::MAX_COEFFICIENT);
            return Err(Error::invalid("coefficient", format!("{coefficient:?}"), allowed));
        }
        let repeated = Block::ALL.iter().any(|b| blocks.iter().filter(|x| *x == b).count() > 1);
        if blocks.is_empty() || repeated {
            return Err(Error::invalid("blocks", format!("{blocks:?}"), "one to four different blocks"));
        }
        if positive_copies > 2 {
            return Err(Error::invalid("positive_copies", positive_copies.to_string(), "0, 1 or 2"));
        }
        Ok(Self { coefficient, blocks: blocks.to_vec(), positive_copies })
    }

    /// c_g.
    pub fn coefficient(&self) -> f64 {
        self.coefficient
    }

    /// The blocks whose kept negatives share this softmax.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// e_g.
    pub fn positive_copies(&self) -> u8 {
        self.positive_copies
    }

    /// The same group with its blocks in the order of [`Block::ALL`].
    pub(crate) fn in_order(&self) -> Self {
        let blocks = Block::ALL.into_iter().filter(|b| self.contains(*b)).collect();
        Self { blocks, ..*self }
    }

    /// Whether `block` is one of [`Group::blocks`].
    pub fn contains(&self, block: Block) -> bool {
        self.blocks.contains(&block)
    }
}

fn is_coefficient(x: f64) -> bool {
    x == 0.0 || (Group::MIN_COEFFICIENT..=Group::MAX_COEFFICIENT).contains(&x)
}

type Row = (f64, &'static [Block], u8);

/// A contrastive loss: a weighted sum of softmax groups, L = Σ_g c_g Σᵢ w̃ᵢ (ℓ_gi − β s⁺ᵢ).
#[derive(Debug, Clone, PartialEq)]
pub struct Loss {
    name: String,
    groups: Vec<Group>,
    margin: Option<f64>,
}

/// α of PAIR as its authors use it.
pub const PAIR_ALPHA: f64 = 0.1;

impl Loss {
    /// Every preset: its name, its groups as (coefficient, blocks, copies of the positive), and its margin.
    pub const PRESETS: &'static [(&'static str, &'static [Row], Option<f64>)] = {
        use Block::{PP, PQ, QP, QQ};
        &[
            ("info_nce", &[(1.0, &[QP], 1)], None),
            ("bidirectional", &[(1.0, &[QP], 1), (1.0, &[PQ], 1)], None),
            ("clip", &[(0.5, &[QP], 1), (0.5, &[PQ], 1)], None),
            ("samtone_query", &[(1.0, &[QP, QQ], 1), (1.0, &[PQ], 1)], None),
            ("samtone_passage", &[(1.0, &[QP], 1), (1.0, &[PQ, PP], 1)], None),
            ("samtone_both", &[(1.0, &[QP, QQ], 1), (1.0, &[PQ, PP], 1)], None),
            ("samtone_query_one_way", &[(1.0, &[QP, QQ], 1)], None),
            ("pair", &[(1.0 - PAIR_ALPHA, &[QP], 1), (PAIR_ALPHA, &[PP], 1)], None),
            ("gte", &[(1.0, &[QP, QQ, PQ, PP], 2)], None),
            ("qwen3", &[(1.0, &[QP, QQ, PP], 1)], Some(0.1)),
            ("decoupled", &[(1.0, &[QP], 0)], None),
        ]
    };

    /// The preset of that name; an error that lists all names otherwise.
    pub fn by_name(name: &str) -> Result<Self> {
        let Some((name, rows, margin)) = Self::PRESETS.iter().find(|(n, ..)| *n == name) else {
            let names: Vec<_> = Self::PRESETS.iter().map(|(n, ..)| *n).collect();
            return Err(Error::invalid("name", format!("{name:?}"), names.join(", ")));
        };
        let groups = rows.iter().map(|&(coefficient, blocks, positive_copies)| Group {
            coefficient,
            blocks: blocks.to_vec(),
            positive_copies,
        });
        Ok(Self { name: (*name).into(), groups: groups.collect(), margin: *margin })
    }

    /// Most groups of a loss.
    pub const MAX_GROUPS: usize = 1 << 16;

    /// Any other member of the family: 1 to 65536 groups, at least one with a coefficient above 0.
    pub fn custom(name: impl Into<String>, groups: Vec<Group>) -> Result<Self> {
        if groups.len() > Self::MAX_GROUPS {
            return Err(Error::invalid(
                "groups",
                format!("{} groups", groups.len()),
                format!("1 to {}", Self::MAX_GROUPS),
            ));
        }
        if !groups.iter().any(|g| g.coefficient > 0.0) {
            return Err(Error::invalid(
                "groups",
                format!("{groups:?}"),
                "one group or more, at least one with a coefficient above 0",
            ));
        }
        Ok(Self { name: name.into(), groups, margin: None })
    }

    /// PAIR (Ren et al. 2021): (1−α)·{QP} + α·{PP}, α from 0 to 1, and 0 or at least 1e-30; the authors use α = 0.1.
    pub fn pair(alpha: f64) -> Result<Self> {
        if !(alpha <= 1.0 && is_coefficient(alpha)) {
            let allowed = format!("a number from 0 to 1, and 0 or at least {:e}", Group::MIN_COEFFICIENT);
            return Err(Error::invalid("alpha", format!("{alpha:?}"), allowed));
        }
        let groups = vec![Group::new(1.0 - alpha, &[Block::QP], 1)?, Group::new(alpha, &[Block::PP], 1)?];
        Self::custom("pair", groups)
    }

    /// Name of the preset, or the one given to [`Loss::custom`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The softmax groups.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The margin that belongs to the loss, if it has one; [`Call::with_margin`](crate::Call::with_margin) overrides it.
    pub fn margin(&self) -> Option<f64> {
        self.margin
    }

    /// Whether any group with a coefficient above 0 contains `block`.
    pub fn uses(&self, block: Block) -> bool {
        self.groups.iter().any(|g| g.coefficient > 0.0 && g.contains(block))
    }
}

macro_rules! presets {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        impl Loss {$(
            $(#[$doc])*
            pub fn $name() -> Self {
                // The name is a row of the table; `every_preset_has_a_constructor` below checks it.
                Self::by_name(stringify!($name)).unwrap_or_else(|_| unreachable!())
            }
        )*}
        #[cfg(test)]
        const CONSTRUCTORS: &[(&str, fn() -> Loss)] = &[$((stringify!($name), Loss::$name)),*];
    };
}

presets! {
    /// InfoNCE with in-batch and hard negatives, query → passage: 1·{QP}.
    info_nce;
    /// Both directions, summed: 1·{QP} + 1·{PQ}.
    bidirectional;
    /// CLIP: both directions, averaged: ½·{QP} + ½·{PQ}.
    clip;
    /// SamToNe as its paper recommends, same-tower negatives on the query side: 1·{QP, QQ} + 1·{PQ}.
    samtone_query;
    /// SamToNe with same-tower negatives on the passage side: 1·{QP} + 1·{PQ, PP}.
    samtone_passage;
    /// SamToNe with same-tower negatives on both sides (§3.4 of the paper): 1·{QP, QQ} + 1·{PQ, PP}.
    samtone_both;
    /// SamToNe, query → passage only: 1·{QP, QQ}.
    samtone_query_one_way;
    /// GTE (Li et al. 2023): 1·{QP, QQ, PQ, PP} with two copies of the positive, one for each direction.
    gte;
    /// Qwen3-Embedding (2025): 1·{QP, QQ, PP}, with a margin of 0.1 that masks false negatives.
    qwen3;
    /// Decoupled contrastive learning: 1·{QP} without the positive in the denominator.
    decoupled;
}

impl fmt::Display for Loss {
    /// `samtone_query = 1·{qp, qq} + 1·{pq}`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = ", self.name)?;
        write_groups(f, &self.groups)
    }
}

/// `1·{qp, qq} + 1·{pq}`
pub(crate) fn write_groups(f: &mut fmt::Formatter<'_>, groups: &[Group]) -> fmt::Result {
    for (k, group) in groups.iter().enumerate() {
        let blocks: Vec<_> = group.blocks.iter().map(|b| b.name()).collect();
        write!(f, "{}{}·{{{}}}", if k == 0 { "" } else { " + " }, group.coefficient, blocks.join(", "))?;
        if group.positive_copies != 1 {
            write!(f, " (e = {})", group.positive_copies)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_has_a_constructor() {
        let by_constructor: Vec<_> = CONSTRUCTORS.iter().map(|(name, make)| (*name, make())).collect();
        for (name, ..) in Loss::PRESETS {
            let preset = Loss::by_name(name).unwrap();
            assert!(!preset.groups().is_empty());
            match *name {
                "pair" => assert_eq!(preset, Loss::pair(PAIR_ALPHA).unwrap()),
                _ => assert!(by_constructor.contains(&(*name, preset)), "{name} has no constructor"),
            }
        }
    }

    #[test]
    fn display_spells_the_formula() {
        assert_eq!(Loss::samtone_query().to_string(), "samtone_query = 1·{qp, qq} + 1·{pq}");
        assert_eq!(Loss::gte().to_string(), "gte = 1·{qp, qq, pq, pp} (e = 2)");
    }
}
