//! A contact sheet: all pictures of a batch on one page, each with its prompt, seed and verdict below.
//!
//! The lettering is a bitmap font compiled in, so the sheet looks the same everywhere and needs no font installed. It
//! knows Latin letters; others are shown as `?`.
mod layout;
mod lettering;

use std::path::PathBuf;

use anyhow::{Context, Result};
use image::imageops::{self, FilterType};
use image::{ImageReader, Limits, Rgb, RgbImage};

use layout::{Layout, MARGIN, TILE};
use lettering::{Ink, LINE_HEIGHT};

/// The most pictures on one sheet: about 60 MB in memory, and more than anyone looks at.
pub const MAX_TILES: usize = 200;

/// A picture file may not ask for more than this, whatever its header says.
const MAX_PICTURE_SIDE: u32 = 4096;

const PAPER: Rgb<u8> = Rgb([250, 250, 248]);
const EMPTY: Rgb<u8> = Rgb([226, 226, 222]);
const TEXT: Ink = Ink { color: Rgb([32, 32, 32]), bold: false };
const TITLE: Ink = Ink { color: Rgb([32, 32, 32]), bold: true };
const FAINT: Ink = Ink { color: Rgb([110, 110, 110]), bold: false };

/// What the safety checker or the fleet said about a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The safety checker found nothing.
    Passed,
    /// The safety checker found something; the pixels are not published.
    Withheld,
    /// The model has no safety checker.
    Unchecked,
    /// The job was given up.
    Discarded,
    /// The job was cancelled.
    Cancelled,
    /// The job is not final yet.
    Waiting,
}

impl Verdict {
    /// In a word or two.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Withheld => "withheld",
            Self::Unchecked => "not checked",
            Self::Discarded => "discarded",
            Self::Cancelled => "cancelled",
            Self::Waiting => "not drawn yet",
        }
    }

    fn ink(self) -> Ink {
        let color = match self {
            Self::Passed => Rgb([22, 120, 60]),
            Self::Withheld | Self::Discarded => Rgb([178, 34, 34]),
            Self::Unchecked | Self::Cancelled | Self::Waiting => Rgb([140, 100, 20]),
        };
        Ink { color, bold: true }
    }
}

/// One place on the sheet.
#[derive(Clone, Debug, PartialEq)]
pub struct Tile {
    /// The prompt, however long.
    pub prompt: String,
    /// The seed.
    pub seed: u32,
    /// The picture's file; without one the verdict stands in its place.
    pub picture: Option<PathBuf>,
    /// What was said about it.
    pub verdict: Verdict,
}

/// Draws `tiles`, at most [`MAX_TILES`] of them, below `title`.
///
/// # Errors
/// If a picture cannot be read.
pub fn draw(title: &str, tiles: &[Tile]) -> Result<RgbImage> {
    let tiles = &tiles[..tiles.len().min(MAX_TILES)];
    let layout = Layout::new(tiles.iter().map(|tile| tile.prompt.as_str()));
    let mut sheet = RgbImage::from_pixel(layout.width, layout.height, PAPER);
    let title = lettering::shortened(title, layout.width - 2 * MARGIN);
    lettering::write(&mut sheet, MARGIN, MARGIN, &title, TITLE);
    for (tile, place) in tiles.iter().zip(&layout.places) {
        match &tile.picture {
            Some(path) => paste(&mut sheet, path, place.x, place.y)?,
            None => {
                fill(&mut sheet, place.x, place.y, TILE, TILE, EMPTY);
                let label = tile.verdict.as_str();
                let x = place.x + (TILE.saturating_sub(lettering::width_of(label))) / 2;
                lettering::write(
                    &mut sheet,
                    x,
                    place.y + (TILE - LINE_HEIGHT) / 2,
                    label,
                    tile.verdict.ink(),
                );
            }
        }
        let mut y = place.y + TILE + MARGIN / 2;
        for line in &place.prompt_lines {
            lettering::write(&mut sheet, place.x, y, line, TEXT);
            y += LINE_HEIGHT;
        }
        let seed = format!("seed {}", tile.seed);
        lettering::write(&mut sheet, place.x, y, &seed, FAINT);
        let verdict = tile.verdict.as_str();
        let x = place.x + TILE.saturating_sub(lettering::width_of(verdict));
        lettering::write(&mut sheet, x, y, verdict, tile.verdict.ink());
    }
    Ok(sheet)
}

/// Puts the picture in the file `path` into the middle of the square tile at (`x`, `y`), as large as fits.
fn paste(sheet: &mut RgbImage, path: &std::path::Path, x: u32, y: u32) -> Result<()> {
    let context = || format!("cannot read the picture {}", path.display());
    let mut reader =
        ImageReader::open(path).with_context(context)?.with_guessed_format().with_context(context)?;
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_PICTURE_SIDE);
    limits.max_image_height = Some(MAX_PICTURE_SIDE);
    reader.limits(limits);
    let picture = reader.decode().with_context(context)?.into_rgb8();
    let (width, height) = layout::fitted(picture.width(), picture.height());
    // Enlarged pixels stay square, so that a small picture is seen as it is; reduced ones are averaged.
    let filter = if width > picture.width() { FilterType::Nearest } else { FilterType::Triangle };
    let picture = imageops::resize(&picture, width, height, filter);
    let (x, y) = (x + (TILE - width) / 2, y + (TILE - height) / 2);
    imageops::replace(sheet, &picture, i64::from(x), i64::from(y));
    Ok(())
}

fn fill(sheet: &mut RgbImage, x: u32, y: u32, width: u32, height: u32, color: Rgb<u8>) {
    let block = RgbImage::from_pixel(width, height, color);
    imageops::replace(sheet, &block, i64::from(x), i64::from(y));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tile(prompt: &str, picture: Option<PathBuf>, verdict: Verdict) -> Tile {
        Tile { prompt: prompt.to_owned(), seed: 42, picture, verdict }
    }

    #[test]
    fn pictures_are_shown_and_withheld_ones_are_labelled() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("red.png");
        let red = Rgb([255, 0, 0]);
        RgbImage::from_pixel(64, 32, red).save(&path).unwrap();
        let tiles =
            [tile("a red one", Some(path), Verdict::Passed), tile("a bad one", None, Verdict::Withheld)];
        let sheet = draw("batch", &tiles).unwrap();
        let layout = Layout::new(tiles.iter().map(|tile| tile.prompt.as_str()));
        let (shown, withheld) = (&layout.places[0], &layout.places[1]);
        // 64 × 32 fills the width of the tile and half of its height.
        assert_eq!(*sheet.get_pixel(shown.x, shown.y + TILE / 2), red);
        assert_eq!(*sheet.get_pixel(shown.x + TILE - 1, shown.y + TILE / 2), red);
        assert_eq!(*sheet.get_pixel(shown.x, shown.y), PAPER);
        assert_eq!(*sheet.get_pixel(withheld.x, withheld.y), EMPTY);
        let label = Verdict::Withheld.ink().color;
        let is_lettered = (0..TILE).flat_map(|x| (0..TILE).map(move |y| (x, y)));
        assert!(
            is_lettered.into_iter().any(|(x, y)| *sheet.get_pixel(withheld.x + x, withheld.y + y) == label)
        );
    }

    #[test]
    fn a_picture_that_cannot_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broken.png");
        std::fs::write(&path, b"not a picture").unwrap();
        let error = draw("batch", &[tile("a", Some(path), Verdict::Passed)]).unwrap_err();
        assert!(error.to_string().ends_with("broken.png"), "{error:#}");
    }

    #[test]
    fn an_empty_batch_and_strange_letters_are_drawn_too() {
        draw("", &[]).unwrap();
        let long = "猫\u{1b}[31m\n".repeat(5_000);
        draw(&long, &[tile(&long, None, Verdict::Waiting)]).unwrap();
    }
}
