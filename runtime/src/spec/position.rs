//! Which field of a JSON text a parser was at when it stopped.

/// Path of the value that covers, or ends directly before, a position (line and column from 1, as serde_json reports
/// them), like `linux.namespaces[0].type`. The text must be JSON.
pub fn field_at(text: &str, line: usize, column: usize) -> String {
    let start: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    let end = (start + column).min(text.len());
    let mut walk = Walk { bytes: text.as_bytes(), at: 0, end, path: Vec::new() };
    walk.value();
    walk.path.iter().fold(String::new(), |mut path, step| {
        match step {
            Step::Index(index) => path += &format!("[{index}]"),
            Step::Key(key) if path.is_empty() => path += key,
            Step::Key(key) => path += &format!(".{key}"),
        }
        path
    })
}

enum Step {
    Key(String),
    Index(usize),
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    end: usize,
    path: Vec<Step>,
}

impl Walk<'_> {
    /// Walks over one value; returns whether it reached the position, leaving the path at where it was.
    fn value(&mut self) -> bool {
        self.space();
        match self.bytes.get(self.at) {
            Some(b'{') => self.members(b'}', |walk, _| {
                let key = walk.string();
                walk.space();
                walk.at += 1; // The colon.
                Step::Key(key)
            }),
            Some(b'[') => self.members(b']', |_, index| Step::Index(index)),
            Some(b'"') => {
                self.string();
                self.at >= self.end
            }
            _ => {
                while self.bytes.get(self.at).is_some_and(|b| !b",]} \t\r\n".contains(b)) {
                    self.at += 1;
                }
                self.at >= self.end
            }
        }
    }

    fn members(&mut self, close: u8, step: impl Fn(&mut Self, usize) -> Step) -> bool {
        self.at += 1;
        for index in 0.. {
            self.space();
            match self.bytes.get(self.at) {
                Some(b) if *b == close => break,
                None => return true,
                _ => {}
            }
            let step = step(self, index);
            self.path.push(step);
            if self.value() {
                return true;
            }
            self.path.pop();
            self.space();
            if self.bytes.get(self.at) == Some(&b',') {
                self.at += 1;
            }
        }
        self.at += 1;
        self.at >= self.end
    }

    fn string(&mut self) -> String {
        let start = self.at + 1;
        self.at = start;
        while self.bytes.get(self.at).is_some_and(|b| *b != b'"') {
            self.at += if self.bytes[self.at] == b'\\' { 2 } else { 1 };
        }
        let text = String::from_utf8_lossy(&self.bytes[start.min(self.bytes.len())..self.at.min(self.bytes.len())]);
        self.at += 1;
        text.into_owned()
    }

    fn space(&mut self) {
        while self.bytes.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_names_the_field_that_covers_it() {
        let text = "{ \"a\": [ 1, { \"b\\\"c\": true } ],\n \"d\": {} }";
        let at = |needle: &str| {
            let offset = text.find(needle).unwrap();
            let line = 1 + text[..offset].matches('\n').count();
            let column = offset - text[..offset].rfind('\n').map_or(0, |n| n + 1);
            field_at(text, line, column + needle.len())
        };
        assert_eq!(at("1"), "a[0]");
        assert_eq!(at("true"), "a[1].b\\\"c");
        assert_eq!(at("{}"), "d");
        assert_eq!(field_at(text, 9, 9), "");
        assert_eq!(field_at("", 1, 0), "");
    }
}
