//! Letters on a picture, from the compiled-in bitmap font.
use image::{Rgb, RgbImage};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

const SIZE: RasterHeight = RasterHeight::Size16;
/// Distance of two lines, in pixels.
pub const LINE_HEIGHT: u32 = 18;
/// Width of every letter, in pixels: the font is monospaced, in both weights alike.
pub const LETTER_WIDTH: u32 = get_raster_width(FontWeight::Regular, SIZE) as u32;
/// Stands for letters that the font does not have.
const UNKNOWN: char = '?';

/// Color and weight of letters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ink {
    /// The color.
    pub color: Rgb<u8>,
    /// Whether they are bold.
    pub bold: bool,
}

/// Width of `text` on one line, in pixels.
pub fn width_of(text: &str) -> u32 {
    u32::try_from(text.chars().count()).unwrap_or(u32::MAX).saturating_mul(LETTER_WIDTH)
}

/// `text`, cut so that it is at most `width` pixels wide.
pub fn shortened(text: &str, width: u32) -> String {
    if width_of(text) <= width {
        return text.to_owned();
    }
    let kept = (width / LETTER_WIDTH).saturating_sub(3) as usize;
    text.chars().take(kept).chain("...".chars()).collect()
}

/// Breaks `text` into at most `max_lines` lines of `width` pixels, between words where it can; the last line says by
/// `...` that there is more.
pub fn wrapped(text: &str, width: u32, max_lines: usize) -> Vec<String> {
    let letters = (width / LETTER_WIDTH).max(4) as usize;
    let mut lines: Vec<String> = vec![String::new()];
    let pieces = text.split_whitespace().flat_map(|word| pieces(word, letters));
    for piece in pieces {
        // One more than are shown is enough to know that there is more.
        if lines.len() > max_lines {
            break;
        }
        let line = lines.last_mut().expect("there is always a line");
        let needed = line.chars().count() + usize::from(!line.is_empty()) + piece.chars().count();
        if needed > letters {
            lines.push(piece);
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(&piece);
        }
    }
    if lines.len() > max_lines {
        lines.truncate(max_lines);
        if let Some(last) = lines.last_mut() {
            let kept: String = last.chars().take(letters - 3).collect();
            *last = format!("{}...", kept.trim_end());
        }
    }
    lines
}

/// A word that is longer than a line, in pieces.
fn pieces(word: &str, letters: usize) -> Vec<String> {
    let word: Vec<char> = word.chars().collect();
    word.chunks(letters).map(|piece| piece.iter().collect()).collect()
}

/// Writes `text` with its top left corner at (`x`, `y`); what would be outside the picture is left out.
pub fn write(picture: &mut RgbImage, x: u32, y: u32, text: &str, ink: Ink) {
    let weight = if ink.bold { FontWeight::Bold } else { FontWeight::Regular };
    let mut left = x;
    for letter in text.chars() {
        let raster = get_raster(letter, weight, SIZE).or_else(|| get_raster(UNKNOWN, weight, SIZE));
        for (row, line) in (0_u32..).zip(raster.iter().flat_map(|raster| raster.rows())) {
            for (column, &coverage) in (0_u32..).zip(line) {
                if let Some(pixel) = picture.get_pixel_mut_checked(left + column, y + row) {
                    blend(pixel, ink.color, coverage);
                }
            }
        }
        left = left.saturating_add(LETTER_WIDTH);
        if left >= picture.width() {
            return;
        }
    }
}

/// Lays `color` over `pixel`, 255 covering it wholly.
fn blend(pixel: &mut Rgb<u8>, color: Rgb<u8>, coverage: u8) {
    for (below, above) in pixel.0.iter_mut().zip(color.0) {
        let (weight, rest) = (u16::from(coverage), 255 - u16::from(coverage));
        let mixed = (u16::from(above) * weight + u16::from(*below) * rest) / 255;
        *below = u8::try_from(mixed).unwrap_or(u8::MAX);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEN: u32 = 10 * LETTER_WIDTH;

    #[test]
    fn lines_break_between_words_where_they_can() {
        assert_eq!(wrapped("a red cat on a mat", TEN, 9), ["a red cat", "on a mat"]);
        assert_eq!(wrapped("supercalifragilistic cat", TEN, 9), ["supercalif", "ragilistic", "cat"]);
        assert_eq!(wrapped("", TEN, 9), [""]);
        assert_eq!(wrapped("one two three four five six", TEN, 2), ["one two", "three f..."]);
        assert_eq!(wrapped("exactly 10", TEN, 1), ["exactly 10"]);
    }

    #[test]
    fn both_weights_are_equally_wide() {
        assert_eq!(get_raster_width(FontWeight::Bold, SIZE) as u32, LETTER_WIDTH);
        assert!(get_raster(UNKNOWN, FontWeight::Bold, SIZE).is_some());
    }

    proptest! {
        #[test]
        fn no_line_is_too_long_and_no_word_is_lost(text in "[a-z é]{0,200}", max_lines in 1_usize..8) {
            let lines = wrapped(&text, TEN, max_lines);
            prop_assert!(lines.len() <= max_lines);
            prop_assert!(lines.iter().all(|line| width_of(line) <= TEN));
            let words: String = text.split_whitespace().collect();
            let kept: String = lines.concat().split_whitespace().collect();
            prop_assert!(kept == words || kept.ends_with("..."));
        }
    }
}
