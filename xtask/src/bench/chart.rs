//! A bar chart of our figures as parts of KVM's, as SVG. Text is in a grey that can be read on white and on black.

use std::fmt::Write;

use super::read::Measured;
use super::rows::{self, Row, Target};
use super::table::{Line, grouped};

/// Width of the picture, of the names on its left and of the figures on its right, in pixels.
const WIDTH: f64 = 970.0;
const NAMES: f64 = 440.0;
const FIGURES: f64 = 150.0;
/// Height of a row and of its bar, and room above and below the rows.
const ROW: f64 = 26.0;
const BAR: f64 = 14.0;
const TOP: f64 = 52.0;
const BOTTOM: f64 = 30.0;
/// The ratio at the right end; longer bars end there, with their figure.
const MOST: f64 = 1.5;

const TEXT: &str = "#808488";
const LINE: &str = "#80848866";
const OURS: &str = "#3d8bd4";
const SLOWER: &str = "#d9822b";
const AIM: &str = "#2fa36b";

/// The picture. Rows that only one side has are left out.
pub(crate) fn svg(measured: &Measured) -> String {
    let lines: Vec<(&Row, Line, f64)> = rows::all()
        .filter(|row| row.drawn)
        .filter_map(|row| {
            let line = Line::of(row, measured);
            let ratio = line.ratio?;
            Some((row, line, ratio))
        })
        .collect();
    let bottom = ROW.mul_add(lines.len() as f64, TOP);
    let height = bottom + BOTTOM;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\" fill=\"{TEXT}\">\n\
         <title>haxm-rs beside KVM {series}, in ticks; shorter is better</title>\n\
         <text x=\"0\" y=\"18\" font-size=\"15\" font-weight=\"bold\">haxm-rs beside KVM {series}</text>\n\
         <text x=\"{NAMES}\" y=\"18\">ticks, as a part of KVM's; shorter is better</text>\n",
        series = escaped(&measured.series)
    );
    scale(&mut text, bottom);
    for (index, (row, line, ratio)) in lines.iter().enumerate() {
        bar(&mut text, ROW.mul_add(index as f64, TOP), row, line, *ratio);
    }
    let y = bottom + 20.0;
    let at = |x: f64| NAMES + x;
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "{}<text x=\"{}\" y=\"{y}\">fewer than KVM</text>\n\
         {}<text x=\"{}\" y=\"{y}\">more than KVM</text>\n\
         <path d=\"M{x} {up}v{BAR}\" stroke=\"{AIM}\" stroke-width=\"3\"/>\
         <text x=\"{}\" y=\"{y}\">the aim</text>\n</svg>\n",
        square(at(0.0), y, OURS),
        at(18.0),
        square(at(130.0), y, SLOWER),
        at(148.0),
        at(272.0),
        x = at(262.0),
        up = y - BAR + 2.0,
    );
    text
}

fn square(x: f64, y: f64, colour: &str) -> String {
    let up = y - 10.0;
    format!("<rect x=\"{x}\" y=\"{up}\" width=\"11\" height=\"11\" fill=\"{colour}\"/>")
}

/// Where a ratio is.
fn place(ratio: f64) -> f64 {
    NAMES + (WIDTH - NAMES - FIGURES) * ratio.min(MOST) / MOST
}

fn scale(text: &mut String, bottom: f64) {
    for tenths in [0, 5, 10, 15] {
        let ratio = f64::from(tenths) / 10.0;
        let (x, top) = (place(ratio), TOP - 6.0);
        // KVM's own figure stands out.
        let colour = if tenths == 10 { TEXT } else { LINE };
        let name = if tenths == 10 {
            "KVM".to_owned()
        } else {
            format!("{ratio:.1}")
        };
        let _ = writeln!(
            text,
            "<path d=\"M{x:.1} {top}V{bottom}\" stroke=\"{colour}\"/>\
             <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\" font-size=\"11\">{name}</text>",
            top - 4.0
        );
    }
}

fn bar(text: &mut String, top: f64, row: &Row, line: &Line, ratio: f64) {
    let (x, end) = (place(0.0), place(ratio));
    let colour = if ratio <= 1.0 { OURS } else { SLOWER };
    let y = top + (ROW - BAR) / 2.0;
    let base = y + BAR - 2.5;
    let _ = writeln!(
        text,
        "<text x=\"{:.1}\" y=\"{base}\" text-anchor=\"end\">{}</text>\
         <rect x=\"{x:.1}\" y=\"{y}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>",
        x - 8.0,
        escaped(row.what),
        (end - x).max(1.0)
    );
    let aim = match row.target {
        Target::None => None,
        Target::Ratio(aim) => Some(aim),
        Target::Most(most) => line.kvm.map(|kvm| most as f64 / kvm as f64),
    };
    if let Some(aim) = aim {
        let _ = writeln!(
            text,
            "<path d=\"M{:.1} {}v{}\" stroke=\"{AIM}\" stroke-width=\"3\"/>",
            place(aim),
            y - 2.0,
            BAR + 4.0
        );
    }
    let _ = writeln!(
        text,
        "<text x=\"{WIDTH}\" y=\"{base}\" text-anchor=\"end\"><tspan font-weight=\"bold\">{ratio:.2}</tspan> \
         ({})</text>",
        grouped(line.ours.unwrap_or(0))
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::super::read::Figures;
    use super::*;

    #[test]
    fn a_row_has_its_bar_and_a_row_of_one_side_has_none() {
        let side = |rows: &[(&str, u64)]| {
            rows.iter()
                .map(|(name, value)| ((*name).to_owned(), Figures::one(*value)))
                .collect()
        };
        let measured = Measured {
            haxm: side(&[("out", 750), ("in", 9000), ("cpuid", 5)]),
            kvm: side(&[("out", 1000), ("in", 1000)]),
            ..Measured::default()
        };
        let text = svg(&measured);
        assert_eq!(text.matches("height=\"14\"").count(), 2, "{text}");
        // Half of the room, all of it, and no more.
        let whole = WIDTH - NAMES - FIGURES;
        assert!(
            text.contains(&format!("width=\"{:.1}\"", whole / 2.0)),
            "{text}"
        );
        assert!(text.contains(&format!("width=\"{whole:.1}\"")), "{text}");
        assert!(text.contains("9.00</tspan> (9,000)"), "{text}");
        assert!(!text.contains(">CPUID<"), "{text}");
    }
}
