//! Finds documented functions in Rust source text: first sentence of the doc comment → signature and body.
//!
//! A scanner rather than a parser: it must cope with files that use macros or syntax newer than any parser knows, it needs
//! no more than where strings, comments and braces are, and it reads 100 MB in about a second.

/// Longest part of a function that is kept, in bytes; the tokeniser's cap is tighter.
const MAX_PASSAGE_BYTES: usize = 4096;
/// A shorter sentence ("See above.") says nothing about its function.
const MIN_WORDS: usize = 3;

/// Calls `found(sentence, function)` for each documented function with a body, in the order of the file.
pub fn for_each_documented_function(source: &str, mut found: impl FnMut(String, &str)) {
    let mut doc: Vec<&str> = Vec::new();
    let mut at = 0;
    while at < source.len() {
        let end = source[at..].find('\n').map_or(source.len(), |n| at + n + 1);
        let line = source[at..end].trim();
        if let Some(text) = line.strip_prefix("///").filter(|rest| !rest.starts_with('/')) {
            doc.push(text);
            at = end;
        } else if doc.is_empty() {
            at = end;
        } else if line.starts_with("#[") {
            // An attribute may stand between the comment and the function, over several lines.
            let start = at + source[at..end].len() - source[at..end].trim_start().len();
            at = skip_balanced(source, start + 1, b'[', b']').map_or(end, |after| after.max(at + 1));
        } else if line.is_empty() || (line.starts_with("//") && !line.starts_with("//!")) {
            at = end;
        } else {
            let start = at + source[at..end].len() - source[at..end].trim_start().len();
            if is_function(line)
                && let Some(stop) = function_end(source, start)
                && let Some(sentence) = first_sentence(&doc)
            {
                found(sentence, truncate(source[start..stop].trim_end(), MAX_PASSAGE_BYTES));
            }
            doc.clear();
            // Go on inside the body: functions nested in it may be documented as well.
            at = end;
        }
    }
}

fn is_function(line: &str) -> bool {
    let mut words = line.split_whitespace();
    words
        .by_ref()
        .find(|word| {
            let qualifier = matches!(*word, "async" | "unsafe" | "const" | "default" | "extern" | "safe");
            let visibility = word.starts_with("pub") || matches!(*word, "crate)" | "super)" | "in");
            !(qualifier || visibility || word.starts_with('"'))
        })
        .is_some_and(|word| word == "fn")
}

/// End of the function that starts at `start`, just after its closing brace; none for a declaration without a body.
fn function_end(source: &str, start: usize) -> Option<usize> {
    let bytes = source.as_bytes();
    let mut at = start;
    let mut depth = 0usize;
    while at < bytes.len() {
        match bytes[at] {
            b'(' | b'[' => depth += 1,
            b')' | b']' => depth = depth.checked_sub(1)?,
            b'{' if depth == 0 => return skip_balanced(source, at, b'{', b'}'),
            b';' if depth == 0 => return None,
            _ => {
                if let Some(after) = skip_token(bytes, at) {
                    at = after;
                    continue;
                }
            }
        }
        at += 1;
    }
    None
}

/// Position after the bracket that closes the one at `open_at`.
fn skip_balanced(source: &str, open_at: usize, open: u8, close: u8) -> Option<usize> {
    let bytes = source.as_bytes();
    let mut depth = 0usize;
    let mut at = open_at;
    while at < bytes.len() {
        if bytes[at] == open {
            depth += 1;
        } else if bytes[at] == close {
            depth = depth.checked_sub(1)?;
            if depth == 0 {
                return Some(at + 1);
            }
        } else if let Some(after) = skip_token(bytes, at) {
            at = after;
            continue;
        }
        at += 1;
    }
    None
}

/// Position after the comment, string or character literal that starts at `at`, if one does: brackets inside do not count.
fn skip_token(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    let find = |from: usize, needle: &[u8]| {
        bytes[from.min(bytes.len())..].windows(needle.len()).position(|w| w == needle).map(|n| from + n + needle.len())
    };
    match rest[0] {
        b'/' if rest.starts_with(b"//") => Some(find(at, b"\n").unwrap_or(bytes.len())),
        b'/' if rest.starts_with(b"/*") => Some(skip_block_comment(bytes, at)),
        b'"' => Some(skip_quoted(bytes, at + 1)),
        b'r' | b'b' | b'c' => {
            // r"…", r#"…"#, br"…", cr"…"; but not the r of an identifier.
            if at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_') {
                return None;
            }
            let prefix = if rest[0] == b'r' { 1 } else { usize::from(rest.get(1) == Some(&b'r')) * 2 };
            if prefix == 0 {
                return None;
            }
            let hashes = rest[prefix..].iter().take_while(|b| **b == b'#').count();
            if rest.get(prefix + hashes) != Some(&b'"') {
                return None;
            }
            let closing: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
            Some(find(at + prefix + hashes + 1, &closing).unwrap_or(bytes.len()))
        }
        b'\'' => match rest.get(1)? {
            b'\\' => Some(find(at + 3, b"'").unwrap_or(bytes.len())),
            // 'x' is a character, 'x without the second quote a lifetime; the character may take up to 4 bytes.
            _ => (2..=5.min(rest.len() - 1)).find(|&n| rest[n] == b'\'').and_then(|n| {
                let one = std::str::from_utf8(&rest[1..n]).is_ok_and(|s| s.chars().count() == 1);
                one.then_some(at + n + 1)
            }),
        },
        _ => None,
    }
}

fn skip_quoted(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

fn skip_block_comment(bytes: &[u8], mut at: usize) -> usize {
    let mut depth = 0usize;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}

/// First sentence of the first paragraph, without Markdown; none if it is a heading, code, or too short.
fn first_sentence(doc: &[&str]) -> Option<String> {
    let paragraph: Vec<&str> =
        doc.iter().map(|l| l.trim()).skip_while(|l| l.is_empty()).take_while(|l| !l.is_empty()).collect();
    let text = paragraph.join(" ");
    if text.starts_with(['#', '`', '|', '<', '!']) && (text.starts_with("```") || !text.starts_with('`')) {
        return None;
    }
    let text = strip_markdown(&text);
    let sentence = &text[..sentence_end(&text)];
    (sentence.split_whitespace().filter(|w| w.chars().any(char::is_alphabetic)).count() >= MIN_WORDS)
        .then(|| sentence.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Just after the first full stop that ends a sentence: one before a space and a capital, and not of an abbreviation.
fn sentence_end(text: &str) -> usize {
    for (at, _) in text.match_indices(['.', '!', '?']) {
        let mut after = text[at + 1..].chars();
        let abbreviation = ["e.g", "i.e", "etc", "vs", "cf"].iter().any(|a| text[..at].ends_with(a));
        match after.next() {
            None => return text.len(),
            Some(c) if c.is_whitespace() && !abbreviation => match after.next() {
                Some(c) if c.is_lowercase() => {}
                _ => return at + 1,
            },
            Some(_) => {}
        }
    }
    text.len()
}

/// `code`, [text](target), [text][target] and *emphasis* become their text.
fn strip_markdown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '`' | '*' | '[' => {}
            ']' => {
                let close = match chars.peek() {
                    Some((_, '(')) => ')',
                    Some((_, '[')) => ']',
                    _ => continue,
                };
                if let Some(end) = text[at..].char_indices().skip(2).find(|(_, c)| *c == close).map(|(n, _)| at + n) {
                    while chars.next_if(|(n, _)| *n <= end).is_some() {}
                }
            }
            _ => out.push(c),
        }
    }
    out
}

/// At most `bytes` bytes of `text`, cut between characters.
fn truncate(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(source: &str) -> Vec<(String, String)> {
        let mut out = Vec::new();
        for_each_documented_function(source, |q, p| out.push((q, p.to_string())));
        out
    }

    #[test]
    fn sentence_and_whole_body() {
        let source = "
/// Returns the [`Foo`](crate::Foo) of `bar`, e.g. a baz. Never panics.
///
/// # Panics
/// Text that must not appear.
#[inline]
#[cfg_attr(feature = \"x\", doc(alias = \"]\"),
    must_use)]
pub(crate) const unsafe fn foo<'a>(x: [u8; 3]) -> &'a str { if x { \"}\" } else { '}'; r#\"\"}\"#; /* } */ \"ok\" } }
fn undocumented() {}
";
        let found = pairs(source);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].0, "Returns the Foo of bar, e.g. a baz.");
        assert!(found[0].1.starts_with("pub(crate) const unsafe fn foo<'a>"), "{found:?}");
        assert!(found[0].1.ends_with("\"ok\" } }"), "{found:?}");
    }

    #[test]
    fn only_functions_with_a_body() {
        let source = "
/// A structure with some text.
struct S { x: fn() }
trait T {
    /// Declares the thing and no more.
    fn declared(&self) -> [u8; 2];
    /// Provides the thing in the trait.
    fn provided(&self) -> u8 { b'}' }
}
/// Says little.
fn short() {}
//// Four slashes are no doc comment.
fn plain() {}
";
        let found = pairs(source);
        assert_eq!(found, [("Provides the thing in the trait.".into(), "fn provided(&self) -> u8 { b'}' }".into())]);
    }

    #[test]
    fn nested_functions_and_many_lines() {
        let source = "/// Does the outer thing\n/// over two lines\nfn outer() {\n    /// Does the inner thing.\n    fn inner() {}\n}\n";
        let found = pairs(source);
        assert_eq!(found[0].0, "Does the outer thing over two lines");
        assert_eq!(found[1], ("Does the inner thing.".into(), "fn inner() {}".into()));
    }

    #[test]
    fn broken_source_ends_quietly() {
        for source in [
            "/// Opens and never closes.\nfn f() { \"",
            "/// Has an attribute only.\n#[inline",
            "/// One two three.\nfn f('",
            "/// Ü ü ü.\nfn ü() { '\\",
        ] {
            assert!(pairs(source).is_empty(), "{source:?}");
        }
    }

    #[test]
    fn sentences() {
        assert_eq!(first_sentence(&["", " One two three? Four."]).unwrap(), "One two three?");
        assert_eq!(first_sentence(&[" Uses v1.2 of it and vs. that"]).unwrap(), "Uses v1.2 of it and vs. that");
        assert_eq!(first_sentence(&[" # Heading of three words"]), None);
        assert_eq!(first_sentence(&[" ```rust of three words"]), None);
        assert_eq!(
            first_sentence(&[" `Code` starts this [link][target] *well*."]).unwrap(),
            "Code starts this link well."
        );
    }
}
