//! The two towers.

use std::fmt;

/// One of the two sides of a dual encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tower {
    /// The side of q.
    Query,
    /// The side of p.
    Passage,
}

impl fmt::Display for Tower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Query => "query",
            Self::Passage => "passage",
        })
    }
}
