//! The figures as a picture: one row of a panel is one figure, its bar the median, its whisker the quartiles, a dashed line
//! its target.

use std::fmt::Write as _;

use super::report::{Figure, Panel, number};

/// Widths and heights in pixels.
const WIDTH: f64 = 960.0;
const LABELS: f64 = 360.0;
const BARS: f64 = 440.0;
const ROW: f64 = 24.0;
const TITLE: f64 = 40.0;
const MARGIN: f64 = 20.0;

/// Bars of what is measured, and of what took longer than it should.
const MET: &str = "#3b6ea5";
const MISSED: &str = "#b5502f";

/// A document of its own.
pub fn svg(title: &str, panels: &[Panel]) -> String {
    let mut body = String::new();
    let mut top = MARGIN + TITLE;
    for panel in panels {
        top = draw(&mut body, panel, top) + MARGIN;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {top}\" width=\"{WIDTH}\" height=\"{top}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{}{body}</svg>\n",
        text(MARGIN, MARGIN + 12.0, "start", "font-size=\"18\" font-weight=\"bold\"", title)
    )
}

/// Draws a panel from `top` on; returns where it ends.
fn draw(body: &mut String, panel: &Panel, top: f64) -> f64 {
    let (drawn, told): (Vec<&Figure>, Vec<&Figure>) =
        panel.figures.iter().partition(|figure| figure.unit == panel.unit);
    let extent = if panel.successive {
        drawn.iter().map(|figure| figure.median()).sum()
    } else {
        let ends = drawn.iter().flat_map(|figure| [figure.quantile(0.75), figure.target.unwrap_or(0.0)]);
        ends.fold(0.0, f64::max)
    };
    let scale = BARS / if extent > 0.0 { extent } else { 1.0 };

    body.push_str(&text(MARGIN, top + 16.0, "start", "font-weight=\"bold\"", panel.title));
    let mut middle = top + TITLE;
    let mut from = LABELS;
    for figure in drawn {
        let (length, low, high) = (figure.median() * scale, figure.quantile(0.25), figure.quantile(0.75));
        let colour = if figure.met() == Some(false) { MISSED } else { MET };
        body.push_str(&text(LABELS - 10.0, middle + 4.0, "end", "", &figure.name));
        let _ = writeln!(
            body,
            "<rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"14\" fill=\"{colour}\"/>",
            middle - 7.0,
            length.max(0.5)
        );
        let mut end = from + length;
        if !panel.successive {
            let (low, high) = (LABELS + low * scale, LABELS + high * scale);
            let _ = writeln!(
                body,
                "<path d=\"M{low:.1} {middle}H{high:.1}M{low:.1} {}v8M{high:.1} {}v8\" stroke=\"#111\"/>",
                middle - 4.0,
                middle - 4.0
            );
            end = end.max(high);
        }
        let mut value = format!("{} {}", number(figure.median()), figure.unit);
        if let Some(target) = figure.target {
            let x = LABELS + target * scale;
            let _ = writeln!(
                body,
                "<path d=\"M{x:.1} {}v22\" stroke=\"#111\" stroke-width=\"1.5\" stroke-dasharray=\"3 2\"/>",
                middle - 11.0
            );
            end = end.max(x);
            let _ = write!(value, " (at most {})", number(target));
        }
        // Beside the bar, unless there is no room for it.
        let room = end + 8.0 * value.len() as f64 <= WIDTH;
        let (x, anchor) = if room { (end + 6.0, "start") } else { (WIDTH - 6.0, "end") };
        body.push_str(&text(x, middle + 4.0, anchor, "", &value));
        if panel.successive {
            from += length;
        }
        middle += ROW;
    }
    for figure in told {
        let mut line = format!("{}: {} {}", figure.name, number(figure.median()), figure.unit);
        if let (Some(target), Some(met)) = (figure.target, figure.met()) {
            let _ = write!(line, ", at most {}: {}", number(target), if met { "met" } else { "missed" });
        }
        body.push_str(&text(LABELS, middle + 4.0, "start", "fill=\"#444\"", &line));
        middle += ROW;
    }
    middle
}

fn text(x: f64, y: f64, anchor: &str, attributes: &str, content: &str) -> String {
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {attributes}>{content}</text>\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_in_the_picture_and_names_cannot_break_it() {
        let figures =
            vec![Figure::new("a < b & c", "ms", vec![3.0]).at_most(2.0), Figure::new("ratio", "times", vec![1.5])];
        let picture = svg("title", &[Panel { title: "Times", unit: "ms", successive: false, figures }]);
        assert!(picture.contains("a &lt; b &amp; c") && picture.contains("ratio: 1.50 times"), "{picture}");
        assert!(picture.contains(MISSED), "{picture}");
    }
}
