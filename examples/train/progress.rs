//! Progress on the console: a bar on a terminal, a line per result elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;

/// `println!` that goes on when its reader has left, as `head` does: the report matters more.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}
pub(crate) use say;

/// One bar over all training steps of all runs.
pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
}

impl Progress {
    /// For so many steps in all.
    pub fn new(steps: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(steps) } else { ProgressBar::hidden() };
        let template = "{bar:28.cyan/blue} {percent:>3}% {elapsed} of about {duration}  {wide_msg}";
        // The template is a constant; were it malformed, the plain style still serves.
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self { bar, terminal }
    }

    /// What runs now.
    pub fn message(&self, text: String) {
        self.bar.set_message(text);
    }

    /// One training step is done.
    pub fn step(&self) {
        self.bar.inc(1);
    }

    /// A line that stays.
    pub fn line(&self, text: &str) {
        if self.terminal {
            self.bar.println(text);
        } else {
            say!("{text}");
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
